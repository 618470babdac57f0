"""The data party: keeps the text, the labels and its layers, and talks to the model party."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from vflair_core import asking, protocol
from vflair_core import cache as caches
from vflair_core.blocks import Stage
from vflair_core.channel import Channel
from vflair_core.defending import Defenses
from vflair_core.defense import Batch, Defense, Exchange
from vflair_core.errors import DefenseError, PartitionError
from vflair_core.handover import check_trainable, hand_over_forward, hand_over_parts, token_tables
from vflair_core.line import Line
from vflair_core.locks import Lock
from vflair_core.message import Phase, Role
from vflair_core.program import Program
from vflair_core.roles import Call, Captured, Given, Probe, find_roles, random_states
from vflair_core.saving import save_data_party, save_tokenizer
from vflair_core.slices import Slices

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from vflair_core.partition import Partition
    from vflair_core.reading import Reading
    from vflair_core.recorder import Recorder
    from vflair_core.task import Example


MAX_PATHS = 4096  # remembered ways of calling the model; forgetting them costs time only


class DataParty:
    """Owns `model`, which stays a transformers model: call it, train it, generate with it as always.

    Args:
        model: A transformers model whose modules `absent` are stand-ins (made by `split`).
        partition: The cut.
        channel: The way to the model party.
        stages: What the model party runs in one exchange each, in call order.
        fingerprint: Of model and cut; the model party must have the same.
        defenses: Applied in this order on the way out, in reverse on the way back.
        tokenizer: Needed for `encode` and `ask`.
        seed: Seed of the defenses' noise; None draws it from the operating system.
        untied: Weights that got a second copy because both sides use them.

    Threads may share it: forwards take turns, and backwards do.

    Set `loss_scale` to what the loss was multiplied with (by a `GradScaler`): defenses see gradients without it.
    """

    recorder: Recorder
    slices: Slices = Slices({})
    order: tuple[str, ...] = ()  # names of all weights, in the order of the whole model
    reading: Reading | None = None  # how the model reads the task at hand; None goes by `task_kind`

    def __init__(
        self,
        model: PreTrainedModel,
        partition: Partition,
        channel: Channel,
        stages: tuple[Stage, ...],
        fingerprint: str,
        *,
        defenses: Sequence[Defense] = (),
        tokenizer: PreTrainedTokenizerBase | None = None,
        seed: int | None = None,
        untied: tuple[str, ...] = (),
    ) -> None:
        self.partition, self.channel, self.stages, self.untied = partition, channel, stages, untied
        self.line = Line(channel, fingerprint)
        self.tokenizer = tokenizer
        self.defenses = Defenses(defenses, partition.kind, seed)
        self.roles: dict[str, tuple[Role, ...]] = {}
        self.loss_scale = 1.0
        self.overflowed = (
            False  # a gradient that was not finite came to the defenses since the last step
        )
        self._lock = Lock()
        self._exchanges = 0
        self._call: Call | None = None
        self._last: Exchange | None = None
        self._begun: Exchange | None = None
        self._probe: Probe | None = None
        self._asking = False
        self._seen_paths: set[Any] = set()
        self.model = hand_over_forward(model, self)
        hand_over_parts(model, self)
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
        return tuple(dict.fromkeys(name for stage in self.stages for name in stage.names))

    @property
    def step(self) -> int:
        """Optimizer steps taken so far."""
        return self.line.step

    @property
    def disclosed(self) -> set[str]:
        """Tensors that crossed although they depend on the text, because the partition says they may."""
        crossing = any("disclosed" in roles for roles in self.roles.values())
        return set(self.partition.disclose) if crossing else set()

    def close(self) -> None:
        """End the session: the model party forgets this party's graphs, caches and gradients."""
        self.line.close()

    def save(self, folder: str | Path) -> Path:
        """Write what this party owns, and nothing else, to ``data_party.safetensors``; `merge` reads it."""
        save_tokenizer(self, Path(folder))
        return save_data_party(self, Path(folder), {})

    # -- calling the model ------------------------------------------------------------------------------

    def run_forward(self, forward: Any, inputs: dict[str, Any]) -> Any:
        """Run the model's own forward with the defenses that act on whole batches around it."""
        with self._lock:
            return self._run_forward(forward, inputs)

    def _run_forward(self, forward: Any, inputs: dict[str, Any]) -> Any:
        if self._probe is not None:
            return forward(**inputs)
        self.defenses.check(self._phase(_cache_in(inputs)))
        self._refuse_raw_text(inputs)
        for defense in self.defenses.at("expand"):
            inputs = {
                **inputs,
                **defense.expand({k: v for k, v in inputs.items() if torch.is_tensor(v)}),
            }
        trains = self.model.training and torch.is_grad_enabled()
        if trains:
            check_trainable(self.model)
        self.recorder.begin()
        random = random_states(self.model.device) if self.model.training else ()
        self._call = Call(forward, inputs, self._past(inputs), random)
        try:
            if trains and inputs.get("labels") is not None:
                inputs = {**inputs, "labels": self._defended_labels(inputs["labels"])}
            outputs = forward(**inputs)
            if trains and self._last is not None:
                self.defenses.penalise(outputs, self._last)
        finally:
            self._call = self._last = self._begun = None
        for defense in reversed(self.defenses.at("contract")):
            outputs = defense.contract(outputs)
        return outputs

    def run_part(self, forward: Any, inputs: dict[str, Any]) -> Any:
        """Run an inner model that was cut: within a call of the whole as it is; alone, as a call of its own.

        `generate` calls the encoder of a sequence-to-sequence model alone, for example.
        """
        if self._probe is not None or self._call is not None:
            return forward(**inputs)
        if self.defenses.at("expand"):
            raise DefenseError(
                f"{type(self.defenses.at('expand')[0]).__name__} adds rows to calls of the whole model; here a "
                "part of it is called alone."
            )
        self.defenses.check(self._phase(_cache_in(inputs)))
        self._refuse_raw_text(inputs)
        self.recorder.begin()
        random = random_states(self.model.device) if self.model.training else ()
        self._call = Call(forward, inputs, self._past(inputs), random)
        try:
            return forward(**inputs)
        finally:
            self._call = self._last = self._begun = None

    def _defended_labels(self, labels: Tensor) -> Tensor:
        if self.defenses.at("on_labels"):
            self._begun = self._begun or self._begin(labels.shape[-1])
            labels = self.defenses.apply("on_labels", labels, self._begun, name="labels")
        return labels

    def smashed(self, **inputs: Any) -> Tensor:
        """Run the head alone and return the undefended hidden states it would send: (B, T, D).

        Nothing crosses. With a `past_key_values`, the local and the absent layers both advance.
        """
        with self._lock:
            return self._smashed(inputs)

    def _smashed(self, inputs: dict[str, Any]) -> Tensor:
        cache = _cache_in(inputs)
        if cache is not None:
            caches.attach(cache, self._layers(self.stages[-1].names), lambda _id: None)
        try:
            with self._probing(Probe()):
                self.model(**inputs)
        except Captured as captured:
            hidden = captured.first_argument()
            if cache is not None:
                caches.advance(cache, hidden.shape[1])
            return hidden
        raise PartitionError("The model was run without reaching the model party.")

    def complete(self, returned: Tensor, **inputs: Any) -> Any:
        """Run the local tail on `returned` as if the model party had sent it, and return the outputs.

        Raises:
            PartitionError: The model takes more than one answer.
        """
        if len(self.stages) > 1:
            raise PartitionError(
                f"{type(self.model).__name__} takes {len(self.stages)} answers of the model party; one is given."
            )
        with self._lock, self._probing(Given(returned)):
            return self.model(**inputs)

    @contextmanager
    def _probing(self, probe: Probe) -> Iterator[None]:
        """While this lasts, nothing is sent: `probe` answers instead of the model party."""
        before, calls = self._probe, self.recorder.calls.copy()
        self._probe = probe
        self.recorder.begin()
        try:
            yield
        finally:
            self._probe = before
            self.recorder.reset()
            self.recorder.calls = calls

    def _past(self, inputs: dict[str, Any]) -> Cache | None:
        """Copy the cache before a call takes a path not seen yet: its roles must be found from there."""
        cache = _cache_in(inputs)
        if cache is None:
            return None
        length, ids = caches.length_of(cache), inputs.get("input_ids")
        given = tuple(key for key, value in inputs.items() if value is not None)
        positions = None if ids is None else ids.shape[-1]
        path = (given, length == 0, positions == 1, self.model.training, _all_ones(inputs))
        if path in self._seen_paths:
            return None
        if len(self._seen_paths) >= MAX_PATHS:
            self._seen_paths.clear()
        self._seen_paths.add(path)
        with torch.inference_mode(False), torch.no_grad():
            return copy.deepcopy(cache)

    def exchange(
        self, program: Program, leaves: list[Tensor], cache: Cache | None, shapes: list[Tensor]
    ) -> list[Tensor]:
        """Take a finished program from the recorder and carry out the round."""
        if self._probe is not None:
            return self._probe.answer(program, leaves, shapes)
        roles = self.roles.get(program.id) or self._find_roles(program, leaves, cache)
        positions = _positions(leaves, roles)
        exchange, self._begun = self._begun or self._begin(positions), None
        self._last = exchange
        spec = None
        if cache is not None:
            remote = caches.attach(
                cache,
                self._layers(program.modules),
                self.line.caches.append,
                lambda old, new: self.line.copies.append((old, new)),
            )
            spec = {"id": remote.id, "deeds": list(remote.deeds)}
            if not remote.known:
                spec["parts"] = remote.parts
        returned = protocol.cross(self, exchange, program, leaves, roles, spec)
        if cache is not None:
            remote.deeds.clear()
            remote.known = True
            caches.advance(cache, positions)
        return returned

    def _begin(self, positions: int) -> Exchange:
        """Number the next exchange. It begins at the embeddings if a defense stands there."""
        self._exchanges += 1
        inputs = self._call.inputs if self._call else {}
        phase = self._phase(_cache_in(inputs))
        # A model with two stacks asks for its second after the first, or with what the first gave before.
        second = self._last is not None or inputs.get("encoder_outputs") is not None
        of_answer = second and bool(self.model.config.is_encoder_decoder)
        mask = _answer_mask(inputs, positions) if of_answer else _mask(inputs, positions)
        return Exchange(self._exchanges, self.line.step, phase, mask=mask, batch=inputs)

    def _layers(self, names: Sequence[str]) -> list[int]:
        """Numbers of the cache layers that the modules `names` fill."""
        return sorted({index for name in names for index in self.recorder.absent[name].layers})

    def _phase(self, cache: Cache | None) -> Phase:
        if self.model.training and torch.is_grad_enabled():
            return "train"
        if cache is None:
            return "eval"
        return "prefill" if getattr(cache, "vflair_remote", None) is None else "decode"

    def _find_roles(
        self, program: Program, leaves: list[Tensor], cache: Cache | None
    ) -> tuple[Role, ...]:
        if self._call is None:
            raise PartitionError(
                "The model party was reached by a call of an inner module before the whole model was called "
                "this way. Call data_party.model(...) once first."
            )
        call = self._call
        if cache is not None and call.past is None:
            call = attrs.evolve(call, past=self._rewound(cache, call.inputs))
        roles = find_roles(
            self.model, call, program, leaves, self.partition.disclose, self._probing
        )
        self.roles[program.id] = roles
        return roles

    def _rewound(self, cache: Cache, inputs: dict[str, Any]) -> Cache | None:
        if _cache_in(inputs) is None:
            return None
        with torch.inference_mode(False), torch.no_grad():
            past = copy.deepcopy(cache)
            ids = inputs.get("input_ids")
            new = ids.shape[-1] if ids is not None else inputs["inputs_embeds"].shape[1]
            caches.advance(past, new)
            past.crop(-new)
        return past

    def _on_embeddings(self, _module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
        if self._probe is not None or self._call is None or not self.defenses.at("on_embeddings"):
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
        return asking.encode_examples(self, examples, max_length)

    def ask(self, texts: Sequence[str], **options: Any) -> list[str]:
        """Generate an answer to each text, through the defenses that act on text, tokens and answers.

        Args:
            texts: Prompts.
            options: Of transformers' `generate`, e.g. ``max_new_tokens=64``.

        Raises:
            DefenseError: There is no tokenizer.
        """
        with asking.answering(self):
            return asking.ask(self, texts, options)

    def _refuse_raw_text(self, inputs: dict[str, Any]) -> None:
        """A batch that did not come through `encode` would go round the defenses that act on text."""
        there = self.defenses.at("on_text") + self.defenses.at("on_tokens")
        encoded = getattr(inputs.get("input_ids"), "vflair_encoded", False)
        if there and not encoded and not self._asking:
            raise DefenseError(
                f"{type(there[0]).__name__} changes text before it is sent, and this batch did not come "
                "through it. Use data_party.encode(examples) or data_party.ask(texts)."
            )

    @property
    def task_kind(self) -> str:
        """The kind of the task at hand; ``"*"`` while nobody said."""
        return self.defenses.task_kind

    @task_kind.setter
    def task_kind(self, kind: str) -> None:
        self.defenses.task_kind = kind


def _cache_in(inputs: Mapping[str, Any]) -> Cache | None:
    return next((value for value in inputs.values() if isinstance(value, Cache)), None)


def _positions(leaves: list[Tensor], roles: tuple[Role, ...]) -> int:
    hidden = [leaf for leaf, role in zip(leaves, roles, strict=True) if role == "smashed"]
    return hidden[0].shape[1] if hidden and hidden[0].dim() > 1 else 1


def _mask(inputs: Mapping[str, Any], positions: int) -> Tensor | None:
    mask = inputs.get("attention_mask")
    return mask[:, -positions:] if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _answer_mask(inputs: Mapping[str, Any], positions: int) -> Tensor | None:
    """The mask of what a decoder reads: its own, else where there is something to learn, else none."""
    mask = inputs.get("decoder_attention_mask")
    labels = inputs.get("labels")
    if mask is None and isinstance(labels, Tensor) and labels.shape[1:] == (positions,):
        return (labels != -100).long()
    return mask[:, -positions:] if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _all_ones(inputs: Mapping[str, Any]) -> bool | None:
    mask = inputs.get("attention_mask")
    return bool(mask.all()) if isinstance(mask, Tensor) else None
