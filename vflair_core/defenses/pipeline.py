"""The defenses of one data party, in their order: who stands where, with which random stream."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor
from transformers.modeling_outputs import SequenceClassifierOutput

from vflair_core.communication.autograd import Sent
from vflair_core.communication.message import Phase, Role
from vflair_core.defenses.account import BEFORE, Account
from vflair_core.defenses.defense import COVERABLE, Defense, Exchange
from vflair_core.errors import DefenseError, alternatives
from vflair_core.randomness import generator_from
from vflair_core.tasks.collation import Batch
from vflair_core.tasks.spans import Replaced


class Defenses:
    """Applied in order on the way out, in reverse on the way back.

    Args:
        each: The defenses.
        partition_kind: HT or HBT.
        seed: Seed of their noise; None draws it from the operating system.
    """

    def __init__(self, each: Sequence[Defense], partition_kind: str, seed: int | None) -> None:
        self.each = tuple(each)
        for defense in self.each:
            for place in defense.covers - set(COVERABLE):
                raise DefenseError(
                    f"{type(defense).__name__} covers {place!r}, which is nothing a defense can cover."
                    f"{alternatives(place, COVERABLE)}"
                )
        self.partition_kind, self.task_kind = partition_kind, "*"
        self.bypassed = False  # for positive controls only
        self._seed = seed
        self._begun = [0] * len(self.each)
        self._generators = [generator_from(seed, n) for n in range(len(self.each))]

    def apply(
        self, place: str, tensor: Any, exchange: Exchange, *, name: str, role: Role = "smashed"
    ) -> Any:
        """Pass `tensor` through the method `place` of every defense that has one."""
        defenses = self.at(place)
        if not defenses:
            _enter(place, tensor, exchange)
            return tensor
        axes = _axes(tensor, exchange)
        incoming = place in ("on_returned", "on_smashed_grad")
        for defense in reversed(defenses) if incoming else defenses:
            if place == "on_smashed" and axes not in defense.axes:
                raise DefenseError(
                    f"{type(defense).__name__} cannot defend {name!r}: its axes are {axes!r} (shape "
                    f"{tuple(tensor.shape)}) and the defense knows {', '.join(sorted(defense.axes))}. Use "
                    "another cut or another defense."
                )
            at_hand = attrs.evolve(
                exchange,
                name=name,
                role=role,
                axes=axes,
                mask=_mask_of(tensor, name, exchange),
                generator=self.generator_of(defense),
            )
            tensor = getattr(defense, place)(tensor, at_hand)
        _enter(place, tensor, exchange)
        return tensor

    def check_sent(self, sent: Sequence[Sent], account: Account, modules: Sequence[str]) -> None:
        """See that what is about to be sent to `modules` has been through every defense that covers it.

        Raises:
            DefenseError: A defense stands where nothing came by.
        """
        passed, account.passed = account.passed, []
        if account.bypassed:
            return
        for place in BEFORE:
            if place not in account.acted:
                names = ", ".join(name for name, role, _ in sent if role == "smashed") or "nothing"
                self._refuse(place, f"{names} to {modules[0]}", account)
        for name, role, tensor in sent:
            if role == "smashed" and not any(tensor is other for other in passed):
                self._refuse("on_smashed", f"{name} to {modules[0]}", account)

    def check_gradient(self, account: Account, backward: int) -> None:
        """See that a gradient about to be sent comes of a loss that defenses of labels and of the loss have seen.

        Raises:
            DefenseError: The `backward` pass at hand came of something else.
        """
        if account.gated and account.loss_pass != backward:
            self.refuse_gradient(account)

    def refuse_gradient(self, account: Account) -> None:
        """Refuse one that comes of something else.

        Raises:
            DefenseError: Always, unless no defense sees labels or the loss.
        """
        for place in ("on_labels", "penalty"):
            self._refuse(place, "a gradient that does not come of the loss which it saw", account)

    def _refuse(self, place: str, what: str, account: Account) -> None:
        each = self.at(place)
        if each:
            raise DefenseError(
                f"{type(each[0]).__name__} stands at {place}, and this call of {account.called} went round it: it would "
                f"send {what}. {_REMEDIES[place]}"
            )

    def generator_of(self, defense: Defense) -> torch.Generator:
        """The random stream of one defense."""
        return next(g for d, g in zip(self.each, self._generators, strict=True) if d is defense)

    @contextmanager
    def bypassing(self) -> Iterator[None]:
        """While this lasts, no defense acts: for positive controls, and to learn what noise does."""
        before, self.bypassed = self.bypassed, True
        try:
            yield
        finally:
            self.bypassed = before

    @property
    def randomness(self) -> str:
        """Where the noise comes from, in a form that does not tell it."""
        if self._seed is None:
            return "the operating system"
        return hashlib.sha256(f"name of {self._seed}".encode()).hexdigest()[:16]

    @property
    def seeded(self) -> bool:
        """Whether the noise has a seed, and can be drawn again; else it comes from the operating system."""
        return self._seed is not None

    def rewind(self, states: Sequence[Tensor]) -> None:
        """Draw again what was drawn since the streams were in these `states`, if they are seeded.

        What comes from the operating system is drawn once: another text may cross now than the one that crossed under it, and
        who has both messages would see their difference without noise.
        """
        if self.seeded:
            for generator, state in zip(self._generators, states, strict=True):
                generator.set_state(state)

    def begin_anew(self, defense: Defense) -> None:
        """Give a defense a stream that it has not drawn from: what `prepare` drew depends on whether it was kept."""
        number = next(n for n, d in enumerate(self.each) if d is defense)
        self._begun[number] += 1
        times = self._begun[number]
        after = "after preparing" if times == 1 else f"after preparing {times}"
        seed = None if self._seed is None else f"{self._seed} {after}"
        self._generators[number].set_state(generator_from(seed, number).get_state())

    def at(self, place: str) -> list[Defense]:
        """Return the defenses that stand at `place`, in order."""
        if self.bypassed or not self.each:
            return []
        base = getattr(Defense, place)
        return [d for d in self.each if getattr(type(d), place) is not base]

    def check(self, phase: Phase) -> None:
        """See that every defense supports the cell at hand.

        Raises:
            DefenseError: One does not; the message says which cells it supports.
        """
        for defense in () if self.bypassed else self.each:
            self._check(defense, phase)

    def _check(self, defense: Defense, phase: Phase) -> None:
        cell = (self.partition_kind, self.task_kind, phase)
        for supported in defense.supports:
            if all(
                "*" in (ours, theirs) or ours == theirs
                for ours, theirs in zip(cell, supported, strict=True)
            ):
                return
        cells = "; ".join(" × ".join(cell) for cell in sorted(defense.supports))
        raise DefenseError(
            f"{type(defense).__name__} does not support {' × '.join(cell)} (partition × task × phase). "
            f"It supports {cells}."
        )

    def fields(self, fields: dict[str, str]) -> dict[str, str]:
        """Pass the texts of one example, ``text`` and perhaps ``pair``, through the defenses that change text.

        Raises:
            DefenseError: One returns other fields than it was given.
        """
        for defense in self.at("on_text"):
            before, fields = fields, defense.on_text(dict(fields))
            if fields.keys() != before.keys():
                raise DefenseError(
                    f"{type(defense).__name__}.on_text was given {', '.join(sorted(before))} and returned "
                    f"{', '.join(sorted(fields)) or 'nothing'}: it may change texts and neither add nor drop any."
                )
            fields = {name: _traced(text, before[name]) for name, text in fields.items()}
        return fields

    def text(self, text: str) -> str:
        """Pass one text through the defenses that change text."""
        return self.fields({"text": text})["text"]

    def tokens(self, batch: Batch) -> Batch:
        """Pass a tokenised batch through the defenses that change tokens."""
        for defense in self.at("on_tokens"):
            batch = Batch(defense.on_tokens(batch))
        return batch

    def answer(self, prompt: str, answer: str) -> str:
        """Pass an answer back through the defenses that change answers."""
        for defense in reversed(self.at("on_answer")):
            answer = defense.on_answer(prompt, answer)
        return answer

    def expand(self, inputs: dict[str, Any], around: Exchange) -> dict[str, Any]:
        """Let defenses add rows to the tensors of a call."""
        for defense in self.at("expand"):
            tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
            inputs = {**inputs, **defense.expand(tensors, self._there(defense, around))}
        _enter("expand", None, around)
        return inputs

    def contract(self, outputs: Any, around: Exchange) -> Any:
        """Let them drop the rows that they added."""
        for defense in reversed(self.at("contract")):
            outputs = defense.contract(outputs, self._there(defense, around))
        return outputs

    def _there(self, defense: Defense, exchange: Exchange) -> Exchange:
        return attrs.evolve(exchange, generator=self.generator_of(defense))

    def places(self, numbers: Tensor, around: Exchange) -> Tensor:
        """Say where the rows of a call are among those that are sent: what `contract` leaves of their `numbers`."""
        outputs = SequenceClassifierOutput(logits=numbers[:, None])
        left: Tensor = self.contract(outputs, around).logits
        return left[:, 0]

    def penalise(self, outputs: Any, exchange: Exchange) -> None:
        """Add the defenses' penalties to the loss of a training forward; without a loss no gradient can leave."""
        if isinstance(outputs, dict) and outputs.get("loss") is None:
            return
        for defense in self.at("penalty"):
            if isinstance(outputs, dict):
                exchange.memo["loss"] = outputs.get("loss")
            penalty = defense.penalty(self._there(defense, exchange))
            if penalty is None:
                continue
            if not isinstance(outputs, dict):
                raise DefenseError(
                    f"{type(defense).__name__} adds to the loss, which a tuple of outputs does not name: "
                    "call the model with return_dict=True."
                )
            outputs["loss"] = outputs["loss"] + penalty
        _enter("penalty", None, exchange)


_OWN_LOSS = (
    "Train on the loss of data_party.model(**batch), labels in the batch, in train mode; a loss that is computed outside "
    "of the model (label_smoothing_factor, compute_loss_func, an inner model) is not seen by it."
)
_REMEDIES = {
    "on_text": "Use data_party.encode(examples) or data_party.ask(texts).",
    "on_tokens": "Use data_party.encode(examples) or data_party.ask(texts).",
    "expand": "Call the whole model: data_party.model(...).",
    "on_embeddings": "Call data_party.model with input_ids or inputs_embeds.",
    "on_smashed": "Call data_party.model(...).",
    "on_labels": _OWN_LOSS,
    "penalty": _OWN_LOSS,
}


def _enter(place: str, tensor: Any, exchange: Exchange) -> None:
    """Note in the account of a call that all defenses of `place` have acted."""
    exchange.account.acted.add(place)
    if place == "on_smashed":
        exchange.account.passed.append(tensor)


def _traced(text: str, before: str) -> str:
    """The text, with the places of its words in what the first defense was given, as far as they are known."""
    if text == before:
        return before
    return text.after(before) if isinstance(text, Replaced) else text


def _mask_of(tensor: Tensor, name: str, exchange: Exchange) -> Tensor | None:
    """The mask that fits the tensor: what an encoder gave crosses to a decoder too, with its own mask."""
    mask = exchange.mask
    if (
        mask is None
        or tensor.dim() < 3
        or (mask.shape[1] in tensor.shape[:2] and not name.startswith("encoder"))
    ):
        return mask
    encoder: Tensor | None = exchange.batch.get("attention_mask")
    fits = encoder is not None and encoder.dim() == 2 and encoder.shape[1] in tensor.shape[:2]
    return encoder if fits else None


def _axes(tensor: Tensor, exchange: Exchange) -> str:
    """Name the dimensions: B and T by the batch at hand, D the last one, ? where nothing fits."""
    ids = exchange.batch.get("input_ids")
    if ids is None:
        ids = exchange.batch.get("inputs_embeds")
    if ids is None or ids.dim() < 2 or tensor.dim() < 2:
        return "BTD"[: tensor.dim()]
    batch, positions = ids.shape[:2]
    if not tensor.is_floating_point():  # labels
        return "BT"[: tensor.dim()]
    answer = [exchange.batch.get(name) for name in ("decoder_input_ids", "labels")]
    lengths = {positions, *(ids.shape[1] for ids in answer if ids is not None and ids.dim() == 2)}
    if tensor.dim() == 3 and tensor.shape[0] == batch and tensor.shape[1] in lengths:
        return "BTD"
    if tensor.dim() == 3 and tuple(tensor.shape[:2]) == (positions, batch):
        return "TBD"
    return "BD" if tensor.dim() == 2 and tensor.shape[0] == batch else "?" * tensor.dim()
