"""The data party: keeps the text, the labels and its layers, and talks to the model party."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from vflair_core.communication import counterparts
from vflair_core.communication.channel import Channel
from vflair_core.communication.connection import Connection
from vflair_core.defenses.calibration import CalibrationCache, Report, Situation
from vflair_core.defenses.defense import Defense
from vflair_core.defenses.guarantee import Guarantee
from vflair_core.defenses.pipeline import Defenses
from vflair_core.errors import DefenseError, PartitionError
from vflair_core.parties.data_party.checkpoint import save_data_party, save_tokenizer
from vflair_core.parties.data_party.model_calls import ModelCalls
from vflair_core.parties.data_party.releases import Releases
from vflair_core.parties.data_party.text import answer_texts, check_examples, check_texts
from vflair_core.partition.slices import Slices
from vflair_core.partition.stages import Stage, names_in
from vflair_core.tasks.collation import Batch
from vflair_core.tasks.preprocessor import Preprocessor
from vflair_core.tasks.tokenization import InputFormat, input_format_of

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
        self._told_moved = False
        self._format: InputFormat | None = None  # how the model reads the task at hand
        self.calls = ModelCalls(
            model, partition, stages, absent, local, self.connection, self.defenses
        )
        self.model = self.calls.model

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
        return self.calls.loss_scaling.factor

    @loss_scale.setter
    def loss_scale(self, factor: float) -> None:
        self.calls.loss_scaling.factor = factor

    @property
    def overflowed(self) -> bool:
        """Whether a gradient that was not finite came to the defenses since the last step."""
        return self.calls.loss_scaling.overflowed

    def begin_step(self) -> None:
        """Forget what came to the defenses before: the step is decided."""
        self.calls.loss_scaling.overflowed = False

    @property
    def crossed(self) -> dict[str, int]:
        """Of private text, how many tensors were sent in each role, and in how many exchanges defenses were ``bypassed``."""
        return {name: count for name, count in sorted(self.calls.crossed.items()) if count}

    @property
    def crossed_by_stack(self) -> Mapping[tuple[str, int], int]:
        """Of private text, how many tensors crossed in either direction by role and stack of the model.

        Every ``exchange`` is counted too, and those with a ``cache``.
        """
        return self.calls.crossed_by_stack

    @property
    def releases(self) -> Releases:
        """The most that crossed of any example so far, defended: what a guarantee has to count."""
        return self.calls.counts.most

    def guarantees(self) -> list[Guarantee]:
        """What each defense, in order, promises of the example of which most has crossed so far."""
        most = self.releases
        return [
            defense.guarantee(most.rows, most.messages, most.gradients)
            for defense in self.defenses.each
        ]

    @property
    def disclosed(self) -> set[str]:
        """Tensors that crossed although they depend on the text, because the partition says they may."""
        return set(self.partition.disclosing) if self.crossed.get("disclosed") else set()

    def open(
        self, optimizer: Mapping[str, Any] | None = None, resume: Sequence[int] | None = None
    ) -> Mapping[str, Any]:
        """Start the session anew with the modules that defenses put behind the channel; see `Connection.open`.

        Raises:
            DefenseError: A defense asks for a module that the model party does not build.
        """
        each = [(type(d).__name__, d.counterpart()) for d in self.defenses.each]
        wanted = [(name, module) for name, module in each if module is not None]
        facts = self.connection.open(*counterparts.describe(wanted), optimizer, resume)
        if (moved := facts.get("moved")) and not self._told_moved:
            self._told_moved = True
            warnings.warn(
                f"The model party's weights are not those that were loaded any more: other sessions took {moved} steps on "
                "them. This one begins there. To begin with the weights as they were, load the model party anew.",
                stacklevel=3,
            )
        return facts

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
        return self.calls.exchanges

    def go_on_from(self, step: int, exchanges: int) -> None:
        """Count steps and exchanges from here: a run is taken up again."""
        self.connection.step, self.calls.exchanges = step, exchanges

    # -- its layers alone -------------------------------------------------------------------------------

    def smashed(self, **inputs: Any) -> Tensor:
        """Run the head alone and return the undefended hidden states it would send: (B, T, D).

        Nothing crosses. With a cache, the local and the absent layers both advance.
        """
        with self.calls.lock:
            return self.calls.dry_runs.smashed(inputs)

    def complete(self, returned: Tensor, **inputs: Any) -> Any:
        """Run the local tail on `returned` as if the model party had sent it, and return the outputs.

        Raises:
            PartitionError: The model takes more than one answer.
        """
        if len(self.stages) > 1:
            raise PartitionError(
                f"{type(self.model).__name__} takes {len(self.stages)} answers of the model party; one is given."
            )
        with self.calls.lock:
            return self.calls.dry_runs.complete(returned, inputs)

    # -- text in, text out ------------------------------------------------------------------------------

    def encode(self, examples: Sequence[Example], *, max_length: int = 512) -> Batch:
        """Turn examples into a batch, through the defenses that act on text and tokens.

        Args:
            examples: Examples of the task that was taken up (`take_up`); by default plain texts, causal-lm.
            max_length: Tokens kept of each.

        Raises:
            DefenseError: There is no tokenizer, or what is given are no examples.
        """
        check_examples(examples)
        return self.preprocessor(max_length).batch(examples).batch

    def ask(self, texts: Sequence[str], **options: Any) -> list[str]:
        """Generate an answer to each text, through the defenses that act on text, tokens and answers.

        Args:
            texts: Prompts.
            options: Of transformers' `generate`, e.g. ``max_new_tokens=64``. With ``num_return_sequences=k`` there are k answers to
                the first text, then k to the second.

        Raises:
            DefenseError: There is no tokenizer, or what is given are no texts.
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

    def answering(self) -> AbstractContextManager[None]:
        """While this lasts, the model may be given tokens: they have been through the defenses that act on text."""
        return self.calls.answering()

    # -- the task at hand -------------------------------------------------------------------------------

    def take_up(self, task: Task, *, processor: Any = None, packing: bool = False) -> InputFormat:
        """Read examples of `task` from now on, and let defenses know its kind; return how it is read.

        Args:
            task: The task.
            processor: Of pictures and text, for a task of kind ``image-text``.
            packing: Training puts several texts into one row.
        """
        reading = input_format_of(task, self.model, processor=processor, packing=packing)
        return self.take_up_format(reading)

    def take_up_format(self, reading: InputFormat) -> InputFormat:
        """The same for who knows how the model should read, whatever the task says."""
        self._format, self.defenses.task_kind = reading, reading.kind
        return reading

    @property
    def task_kind(self) -> str:
        """The kind of the task that was taken up (`take_up`); ``"*"`` while there is none."""
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
        check_texts(public_texts, "prepare")
        self.calibration = CalibrationCache(cache, report)
        with self.public_text():
            for defense in self.defenses.each:
                defense.prepare(public_texts, self)

    def without_dropout(self) -> AbstractContextManager[None]:
        """While this lasts, nothing is dropped at either party, though the model may be in train mode."""
        return self.calls.without_dropout()

    def without_adapters(self) -> AbstractContextManager[None]:
        """While this lasts, the adapters of peft are off at both parties, whichever of them has any."""
        return self.calls.without_adapters()

    def public_text(self) -> AbstractContextManager[None]:
        """While this lasts, what crosses is public text: nothing is counted, and gradients may be of any loss."""
        return self.calls.counts.of_public_text()

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
