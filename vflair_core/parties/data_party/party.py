"""The data party: keeps the text, the labels and its layers, and talks to the model party."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from vflair_core.communication import counterparts
from vflair_core.communication.channel import Channel
from vflair_core.communication.connection import Connection
from vflair_core.communication.locks import Lock
from vflair_core.communication.message import Phase, Role
from vflair_core.communication.program import Program
from vflair_core.defenses.calibration import CalibrationCache, Report, Situation
from vflair_core.defenses.defense import Defense, Exchange
from vflair_core.defenses.pipeline import Defenses
from vflair_core.errors import DefenseError, PartitionError
from vflair_core.parties.data_party import remote_cache
from vflair_core.parties.data_party.checkpoint import save_data_party, save_tokenizer
from vflair_core.parties.data_party.dry_runs import DryRuns
from vflair_core.parties.data_party.inputs import (
    RowPlacement,
    answer_mask,
    cache_in,
    learnt_of,
    mask_of,
    positions_of,
    rows_of,
)
from vflair_core.parties.data_party.interception import (
    check_trainable,
    hand_over_forward,
    hand_over_parts,
    token_tables,
)
from vflair_core.parties.data_party.recorder import Recorder
from vflair_core.parties.data_party.roles import Call
from vflair_core.parties.data_party.round import LossScale, round_trip
from vflair_core.parties.data_party.scored_positions import SCORED, only_scored
from vflair_core.parties.data_party.stubs import put_stubs
from vflair_core.parties.data_party.text import answer_texts
from vflair_core.partition.slices import Slices
from vflair_core.partition.stages import Stage, names_in, stage_of
from vflair_core.randomness import random_states
from vflair_core.tasks.collation import Batch, is_defended
from vflair_core.tasks.preprocessor import Preprocessor
from vflair_core.tasks.tokenization import InputFormat, reading_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from vflair_core.partition.partition import Partition
    from vflair_core.tasks.task import Example, Task


class DataParty:
    """Owns `model`, which stays a transformers model: call it, train it, generate with it as always.

    Args:
        model: A transformers model; it keeps its local modules, and stubs come where `absent` ones were.
        partition: The cut.
        channel: The way to the model party.
        stages: What the model party runs in one exchange each, in call order.
        fingerprint: Of model and cut; the model party must have the same.
        absent: The modules of `stages` by name; only their structure is used.
        local: Blocks that both parties need: for each call, whether it is made here.
        order: Names of all weights, in the order of the whole model.
        slices: Which part of the model each weight belongs to.
        defenses: Applied in this order on the way out, in reverse on the way back.
        tokenizer: Needed for `encode` and `ask`.
        seed: Seed of the defenses' noise; None draws it from the operating system.
        untied: Weights that got a second copy because both sides use them.

    Threads may share it: forwards take turns, and backwards do.

    Set `loss_scale` to what the loss was multiplied with (by a `GradScaler`): defenses see gradients without it.
    """

    sent: RowPlacement | None = None  # how the rows of the last call crossed

    def __init__(
        self,
        model: PreTrainedModel,
        partition: Partition,
        channel: Channel,
        stages: tuple[Stage, ...],
        fingerprint: str,
        absent: Mapping[str, nn.Module],
        *,
        local: Mapping[str, tuple[bool, ...]],
        order: tuple[str, ...],
        slices: Slices,
        untied: tuple[str, ...] = (),
        defenses: Sequence[Defense] = (),
        tokenizer: PreTrainedTokenizerBase | None = None,
        seed: int | None = None,
    ) -> None:
        self.partition, self.channel, self.stages = partition, channel, stages
        self.order, self.slices, self.untied = order, slices, untied
        self.connection = Connection(channel, fingerprint)
        self.tokenizer = tokenizer
        self.defenses = Defenses(defenses, partition.kind, seed)
        self.calibration = CalibrationCache()
        self.loss_scaling = LossScale()
        self._format: InputFormat | None = None  # how the model reads the task at hand
        self._lock = Lock()
        self._exchanges = 0
        self._call: Call | None = None
        self._last: Exchange | None = None
        self._done: list[Exchange] = []  # all of the call at hand
        self._begun: Exchange | None = None
        self._asking = False
        self.model = hand_over_forward(model, self.run_forward)
        hand_over_parts(model, self.absent, self.run_part)
        self.recorder = Recorder(self.exchange, stages, picks=SCORED in partition.disclose)
        stubs = put_stubs(model, absent, local, self.recorder.call, self.recorder.calls)
        self.recorder.absent.update(stubs)
        self.dry_runs = DryRuns(model, self.recorder, stages, partition.disclose)
        tables = token_tables(model)
        if not tables and self.defenses.at("on_embeddings"):
            raise PartitionError(
                f"{type(model).__name__} has no table of token embeddings for a defense to stand at."
            )
        for table in tables:
            table.register_forward_hook(self._on_embeddings)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Weights by the names they have in the whole model."""
        return self.model.named_parameters()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Weights, in the order of the whole model."""
        return self.model.parameters()

    @property
    def absent(self) -> tuple[str, ...]:
        """Names of the modules the model party holds, in call order."""
        return names_in(self.stages)

    @property
    def step(self) -> int:
        """Optimizer steps taken so far."""
        return self.connection.step

    @property
    def loss_scale(self) -> float:
        """What the loss is multiplied with before its backward; 1 without a `GradScaler`."""
        return self.loss_scaling.factor

    @loss_scale.setter
    def loss_scale(self, factor: float) -> None:
        self.loss_scaling.factor = factor

    @property
    def roles(self) -> dict[str, tuple[Role, ...]]:
        """Roles of what crosses, by the id of the program that takes it."""
        return self.dry_runs.roles

    @property
    def disclosed(self) -> set[str]:
        """Tensors that crossed although they depend on the text, because the partition says they may."""
        crossing = any("disclosed" in roles for roles in self.roles.values())
        return set(self.partition.disclose) if crossing else set()

    def open(
        self, optimizer: Mapping[str, Any] | None = None, resume: Sequence[int] | None = None
    ) -> Mapping[str, Any]:
        """Start the session anew with the modules that defenses put behind the channel; see `Connection.open`.

        Raises:
            DefenseError: A defense asks for a module that the model party does not build.
        """
        each = [(type(d).__name__, d.counterpart()) for d in self.defenses.each]
        wanted = [(name, module) for name, module in each if module is not None]
        return self.connection.open(*counterparts.describe(wanted), optimizer, resume)

    def close(self) -> None:
        """End the session: the model party forgets this party's graphs, caches and gradients."""
        self.connection.close()

    def save(self, folder: str | Path) -> Path:
        """Write what this party owns, and nothing else, to ``data_party.safetensors``; `merge` reads it."""
        save_tokenizer(Path(folder), self.tokenizer)
        return self.save_part(Path(folder), {})

    def save_part(self, folder: Path, extra: Mapping[str, Tensor], **facts: Any) -> Path:
        """The same with `extra` tensors and `facts`, of a run that goes on from there."""
        return save_data_party(
            folder,
            self.model,
            fingerprint=self.connection.fingerprint,
            session=self.connection.session,
            step=self.step,
            untied=self.untied,
            extra=extra,
            **facts,
        )

    @property
    def exchanges(self) -> int:
        """Forwards across the cut so far."""
        return self._exchanges

    def go_on_from(self, step: int, exchanges: int) -> None:
        """Count steps and exchanges from here: a run is taken up again."""
        self.connection.step, self._exchanges = step, exchanges

    # -- calling the model ------------------------------------------------------------------------------

    def run_forward(self, forward: Any, inputs: dict[str, Any]) -> Any:
        """Run the model's own forward with the defenses that act on whole batches around it."""
        with self._lock:
            return self._run_forward(forward, inputs)

    def _run_forward(self, forward: Any, inputs: dict[str, Any]) -> Any:
        if self.dry_runs.probe is not None:
            return forward(**inputs)
        self.defenses.check(self._phase(cache_in(inputs)))
        self._refuse_raw_text(inputs)
        around = Exchange(self._exchanges + 1, self.connection.step, self._phase(cache_in(inputs)))
        inputs = self.defenses.expand(inputs, around)
        self.sent = self._how_sent(inputs, around)
        trains = self.model.training and torch.is_grad_enabled()
        if trains:
            check_trainable(self.model)
        self.recorder.begin()
        random = random_states(self.model.device) if self.model.training else ()
        self._call = Call(forward, inputs, self.dry_runs.past(inputs), random)
        try:
            if trains and inputs.get("labels") is not None:
                inputs = {**inputs, "labels": self._defended_labels(inputs["labels"])}
                inputs = only_scored(self.model, self.partition, inputs)
                self._call.inputs = inputs
            outputs = forward(**inputs)
            if trains:
                for exchange in self._done:
                    self.defenses.penalise(outputs, exchange)
        finally:
            self._call = self._last = self._begun = None
            self._done = []
        return self.defenses.contract(outputs, around)

    def _how_sent(self, inputs: dict[str, Any], around: Exchange) -> RowPlacement:
        numbers = torch.arange(rows_of(inputs), device=self.model.device)
        shifted = not self.model.config.is_encoder_decoder
        return RowPlacement(
            self.defenses.places(numbers, around), learnt_of(inputs, shifted=shifted)
        )

    def run_part(self, forward: Any, inputs: dict[str, Any]) -> Any:
        """Run an inner model that was cut: within a call of the whole as it is; alone, as a call of its own.

        `generate` calls the encoder of a sequence-to-sequence model alone, for example.
        """
        if self.dry_runs.probe is not None or self._call is not None:
            return forward(**inputs)
        if self.defenses.at("expand"):
            raise DefenseError(
                f"{type(self.defenses.at('expand')[0]).__name__} adds rows to calls of the whole model; here a "
                "part of it is called alone."
            )
        self.defenses.check(self._phase(cache_in(inputs)))
        self._refuse_raw_text(inputs)
        self.recorder.begin()
        random = random_states(self.model.device) if self.model.training else ()
        self._call = Call(forward, inputs, self.dry_runs.past(inputs), random)
        try:
            return forward(**inputs)
        finally:
            self._call = self._last = self._begun = None
            self._done = []

    def _defended_labels(self, labels: Tensor) -> Tensor:
        if self.defenses.at("on_labels"):
            self._begun = self._begun or self._begin(labels.shape[-1])
            labels = self.defenses.apply("on_labels", labels, self._begun, name="labels")
        return labels

    def smashed(self, **inputs: Any) -> Tensor:
        """Run the head alone and return the undefended hidden states it would send: (B, T, D).

        Nothing crosses. With a cache, the local and the absent layers both advance.
        """
        with self._lock:
            return self.dry_runs.smashed(inputs)

    def complete(self, returned: Tensor, **inputs: Any) -> Any:
        """Run the local tail on `returned` as if the model party had sent it, and return the outputs.

        Raises:
            PartitionError: The model takes more than one answer.
        """
        if len(self.stages) > 1:
            raise PartitionError(
                f"{type(self.model).__name__} takes {len(self.stages)} answers of the model party; one is given."
            )
        with self._lock:
            return self.dry_runs.complete(returned, inputs)

    def exchange(
        self, program: Program, leaves: list[Tensor], cache: Cache | None, shapes: list[Tensor]
    ) -> list[Tensor]:
        """Take a finished program from the recorder and carry out the round."""
        if self.dry_runs.probe is not None:
            return self.dry_runs.probe.answer(program, leaves, shapes)
        roles = self.roles.get(program.id) or self.dry_runs.find_roles(
            self._call, program, leaves, cache
        )
        positions = positions_of(leaves, roles)
        exchange, self._begun = self._begun or self._begin(positions), None
        self._last = exchange
        self._done.append(exchange)
        spec = None
        if cache is not None:
            remote = remote_cache.attach(
                cache,
                self.recorder.layers(stage_of(program.modules, self.stages).names),
                self.connection.caches.append,
                lambda old, new: self.connection.copies.append((old, new)),
            )
            spec = {"id": remote.id, "deeds": list(remote.deeds)}
            if not remote.known:
                spec["parts"] = remote.parts
        returned = round_trip(
            self.connection,
            self.defenses,
            self.loss_scaling,
            exchange,
            program,
            leaves,
            roles,
            cache=spec,
            training=self.model.training,
        )
        if cache is not None:
            remote.deeds.clear()
            remote.known = True
            remote_cache.advance(cache, positions, self.recorder.layers(program.modules))
        return returned

    def _begin(self, positions: int) -> Exchange:
        """Number the next exchange. It begins at the embeddings if a defense stands there."""
        self._exchanges += 1
        inputs = self._call.inputs if self._call else {}
        phase = self._phase(cache_in(inputs))
        # A model with two stacks asks for its second after the first, or with what the first gave before.
        second = self._last is not None or inputs.get("encoder_outputs") is not None
        of_answer = second and bool(self.model.config.is_encoder_decoder)
        mask = answer_mask(inputs, positions) if of_answer else mask_of(inputs, positions)
        return Exchange(self._exchanges, self.connection.step, phase, mask=mask, batch=inputs)

    def _phase(self, cache: Cache | None) -> Phase:
        if self.model.training and torch.is_grad_enabled():
            return "train"
        if cache is None:
            return "eval"
        return "prefill" if getattr(cache, "vflair_remote", None) is None else "decode"

    def _on_embeddings(self, _module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
        if (
            self.dry_runs.probe is not None
            or self._call is None
            or not self.defenses.at("on_embeddings")
        ):
            return None
        self._begun = self._begun or self._begin(output.shape[1])
        defended: Tensor = self.defenses.apply(
            "on_embeddings", output, self._begun, name="embeddings", role="smashed"
        )
        return defended

    # -- text in, text out ------------------------------------------------------------------------------

    def encode(self, examples: Sequence[Example], *, max_length: int = 512) -> Batch:
        """Turn examples into a batch, through the defenses that act on text and tokens.

        Args:
            examples: Examples of a task of kind `task_kind` (by default causal-lm).
            max_length: Tokens kept of each.

        Raises:
            DefenseError: There is no tokenizer.
        """
        return self.preprocessor(max_length).batch(examples).batch

    def ask(self, texts: Sequence[str], **options: Any) -> list[str]:
        """Generate an answer to each text, through the defenses that act on text, tokens and answers.

        Args:
            texts: Prompts.
            options: Of transformers' `generate`, e.g. ``max_new_tokens=64``.

        Raises:
            DefenseError: There is no tokenizer.
        """
        tokenizer = self._needed_tokenizer()
        with self.answering():
            return answer_texts(self.model, tokenizer, self.defenses, texts, options)

    def preprocessor(self, max_length: int) -> Preprocessor:
        """Return what turns examples of the task at hand into batches, through the defenses of text and tokens.

        Raises:
            DefenseError: There is no tokenizer.
        """
        reading = self._format
        if reading is None:
            kind: Any = "causal-lm" if self.task_kind == "*" else self.task_kind
            reading = InputFormat(kind=kind, two_stacks=bool(self.model.config.is_encoder_decoder))
        tokenizer = self._needed_tokenizer()
        return Preprocessor(tokenizer, reading, max_length, self.defenses, self.model.device)

    def _needed_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise DefenseError("Text needs a tokenizer: split(model, partition, tokenizer=...).")
        return self.tokenizer

    @contextmanager
    def answering(self) -> Iterator[None]:
        """While this lasts, the model may be given tokens: they have been through the defenses that act on text."""
        with self._lock:
            self._asking = True
            try:
                yield
            finally:
                self._asking = False

    def _refuse_raw_text(self, inputs: dict[str, Any]) -> None:
        """A batch that did not come through `encode` would go round the defenses that act on text."""
        changing = self.defenses.at("on_text") + self.defenses.at("on_tokens")
        if changing and not is_defended(inputs.get("input_ids")) and not self._asking:
            raise DefenseError(
                f"{type(changing[0]).__name__} changes text before it is sent, and this batch did not come "
                "through it. Use data_party.encode(examples) or data_party.ask(texts)."
            )

    # -- the task at hand -------------------------------------------------------------------------------

    def take_up(self, task: Task, *, processor: Any = None, packing: bool = False) -> InputFormat:
        """Read examples of `task` from now on, and let defenses know its kind; return how it is read.

        Args:
            task: The task.
            processor: Of pictures and text, for a task of kind ``image-text``.
            packing: Training puts several texts into one row.
        """
        reading = reading_of(task, self.model, processor=processor, packing=packing)
        return self.take_up_format(reading)

    def take_up_format(self, reading: InputFormat) -> InputFormat:
        """The same for who knows how the model should read, whatever the task says."""
        self._format, self.defenses.task_kind = reading, reading.kind
        return reading

    @property
    def task_kind(self) -> str:
        """The kind of the task at hand; ``"*"`` while nobody said."""
        return self.defenses.task_kind

    def prepare(
        self,
        public_texts: Sequence[str],
        *,
        cache: Path | None = None,
        report: Report = lambda *_: None,
    ) -> None:
        """Let every defense calibrate itself on public text, in order, before anything private is touched.

        Args:
            public_texts: Text that anyone can have.
            cache: A folder where what takes long is kept for the next time; None keeps nothing.
            report: Told (what, done, total) now and then.
        """
        self.calibration = CalibrationCache(cache, report)
        for defense in self.defenses.each:
            defense.prepare(public_texts, self)

    def remember(
        self,
        defense: Defense,
        public_texts: Sequence[str],
        make: Callable[[], dict[str, Tensor]],
        **facts: str,
    ) -> dict[str, Tensor]:
        """Return what `make` makes: by calling it, or from the cache (`CalibrationCache.remember`)."""
        situation = Situation(
            self.model,
            self.tokenizer,
            self.connection.fingerprint,
            self.untied,
            self.defenses.each,
        )
        return self.calibration.remember(defense, public_texts, make, situation, **facts)

    def tell(self, defense: Defense, done: int, total: int) -> None:
        """Say how far `defense` is with its preparation."""
        self.calibration.tell(defense, done, total)
