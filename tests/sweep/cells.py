"""One model type in all its cells: split against unsplit, bit for bit."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from typing import Any

import cases
import torch
from attrs import frozen
from torch import Tensor
from transformers import PreTrainedModel

from vflair_core import Partition, split
from vflair_core.errors import LeakError, VflairError

NEW_TOKENS = 6
TOLERANCE = 1e-5  # of gradients that are summed in another order, relative to their largest entry
LARGEST = 5_000_000  # weights
TEXT = ("input_ids", "decoder_input_ids", "labels", "y")  # never disclosed


@frozen
class Cell:
    """One way of cutting and calling a model."""

    head: int
    tail: int
    padded: bool
    attention: str

    @property
    def kind(self) -> str:
        """HT when the model party holds the end."""
        return "HBT" if self.tail else "HT"


def cells(*, quick: bool) -> Iterator[Cell]:
    """Return the cells of a sweep, those with the same unsplit model next to each other."""
    for attention in ("sdpa",) if quick else ("sdpa", "eager"):
        for padded in (False, True):
            for head in (1,) if quick else (1, 0, 2):
                for tail in (1, 0):
                    yield Cell(head, tail, padded, attention)


def examine(model_type: str, task: str, *, quick: bool) -> dict[str, Any]:
    """Return what came out for one pair of type and task, ready for JSON."""
    started = time.monotonic()
    result: dict[str, Any] = {"task": task, "type": model_type, "runnable": False, "cells": []}
    try:
        whole = cases.build(model_type, task)
        weights = sum(p.numel() for p in whole.parameters())
        references = _References(whole, task)
        names = references.names() if weights <= LARGEST else []
    except Exception as error:  # noqa: BLE001 - whatever a type of transformers does here is noted
        return {**result, "reason": _said(error), "seconds": time.monotonic() - started}
    if not names:
        return {**result, "reason": f"the small model still has {weights} weights", "seconds": 0.0}
    result["runnable"], result["inputs"] = True, names
    for cell in cells(quick=quick):
        if cell.attention == "eager" and not type(whole)._supports_sdpa:
            continue  # that is what "sdpa" means for such a type: the same cell
        for name in names:
            found = _compare(references, cell, name, generates=task in cases.GENERATES)
            facts = {"head": cell.head, "tail": cell.tail, "padded": cell.padded}
            result["cells"].append({**facts, "attention": cell.attention, "inputs": name, **found})
    return {**result, "seconds": round(time.monotonic() - started, 2)}


class _References:
    """The unsplit model and what it computes, each computed once."""

    def __init__(self, whole: PreTrainedModel, task: str) -> None:
        self.whole, self.task = whole, task
        self._steps: dict[Any, Any] = {}
        self._texts: dict[Any, Any] = {}
        self._models: dict[str, PreTrainedModel] = {}

    def names(self) -> list[str]:
        """Return the inputs that the unsplit model runs with, reproducibly.

        Raises:
            Exception: It runs with none.
        """
        problems, names = [], []
        for name in cases.batches(copy.deepcopy(self.whole), self.task, padded=False):
            try:
                self._repeat(name)
            except Exception as error:  # noqa: BLE001 - the next inputs may do
                problems.append(error)
            else:
                names.append(name)
        if not names:
            raise problems[-1]
        return names

    def _repeat(self, name: str) -> None:
        for padded in (False, True):
            first = self.step("sdpa", name, padded=padded)
            again = train_step(self.model("sdpa"), self.batch(name, padded=padded))
            if difference := _difference(first, again):
                raise ValueError(f"two runs of the unsplit model differ: {difference}")

    def model(self, attention: str) -> PreTrainedModel:
        """Return a fresh copy of the unsplit model."""
        if attention not in self._models:
            model = copy.deepcopy(self.whole)
            if attention == "eager":
                model.set_attn_implementation("eager")
            self._models[attention] = model
        return copy.deepcopy(self._models[attention])

    def batch(self, name: str, *, padded: bool) -> dict[str, Tensor]:
        """Return the inputs `name`."""
        return cases.batches(copy.deepcopy(self.whole), self.task, padded=padded)[name]

    def step(self, attention: str, name: str, *, padded: bool) -> dict[str, Any]:
        """Return loss, logits and gradients of the unsplit model."""
        key = attention, name, padded
        if key not in self._steps:
            self._steps[key] = train_step(self.model(attention), self.batch(name, padded=padded))
        return self._steps[key]

    def text(self, attention: str, name: str, *, padded: bool) -> Any:
        """Return what the unsplit model generates, or the exception it raises."""
        key = attention, name, padded
        if key not in self._texts:
            try:
                answer = generate(self.model(attention), self.batch(name, padded=padded))
            except Exception as error:  # noqa: BLE001 - there is nothing to compare with then
                answer = error
            self._texts[key] = answer
        return self._texts[key]


def train_step(
    model: PreTrainedModel, batch: dict[str, Tensor], gradients: Callable[[], Any] | None = None
) -> dict[str, Any]:
    """Run forward and backward and return loss, logits and gradients by name."""
    torch.manual_seed(1)
    model.train()
    model.zero_grad(set_to_none=True)
    outputs = model(**{key: value.clone() for key, value in batch.items()})
    logits = [
        outputs[key]
        for key in ("logits", "start_logits", "end_logits")
        if outputs.get(key) is not None
    ] or [value for value in outputs.values() if isinstance(value, Tensor) and value.dim()][:1]
    loss = outputs.get("loss")
    if loss is None:  # a type that leaves its loss to others
        loss = sum(tensor.float().square().mean() for tensor in logits)
    loss.backward()
    named = gradients() if gradients else model.named_parameters()
    return {
        "loss": loss.detach(),
        "logits": [tensor.detach() for tensor in logits],
        "gradients": {name: p.grad for name, p in named},
    }


def generate(model: PreTrainedModel, batch: dict[str, Tensor]) -> dict[str, Any]:
    """Generate greedily with a cache and return tokens and logits."""
    inputs = {key: value.clone() for key, value in batch.items() if key != "labels"}
    torch.manual_seed(1)
    made = model.eval().generate(
        **inputs,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        num_beams=1,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return {"loss": made.sequences, "logits": list(made.logits), "gradients": {}}


def _compare(references: _References, cell: Cell, name: str, *, generates: bool) -> dict[str, str]:
    """Compare one cell; where a tensor that tells something of the text is refused, again with it disclosed."""
    disclosed: tuple[str, ...] = ()
    while True:
        try:
            found = _compared(references, cell, name, disclosed, generates=generates)
        except LeakError as error:
            disclosed = (*disclosed, str(error.tensor))
        else:
            return found


def _compared(
    references: _References, cell: Cell, name: str, disclosed: tuple[str, ...], *, generates: bool
) -> dict[str, str]:
    partition = Partition(head=cell.head, tail=cell.tail, disclose=disclosed)
    expected = references.step(cell.attention, name, padded=cell.padded)
    batch = references.batch(name, padded=cell.padded)
    whole = references.model(cell.attention)
    parties: list[Any] = []
    idle: list[bool] = []

    def train() -> str:
        torch.manual_seed(0)
        party, model_party = split(copy.deepcopy(whole), partition, wire=True)
        parties.append(party)

        def named() -> dict[str, Tensor]:
            return dict(party.named_parameters()) | dict(model_party.named_parameters())

        got = train_step(party.model, batch, lambda: named().items())
        tied = _tied_twins(whole) | set(party.untied) if party.untied else set()
        idle.append(all(p.grad is None for p in model_party.parameters()))
        return _difference(expected, got, besides=tied)

    def text() -> str:
        return _difference(wanted, generate(parties[0].model, batch))

    found = _outcome("train", train, disclosed)
    if found["train"] in {"exact", "disclosed"} and idle[0]:
        found = {"train": "idle", "train_detail": "the model party took no part"}
    if not generates:
        return found
    if found["train"] in {"refused", "idle"} or not parties:
        return found | {
            "generate": found["train"],
            "generate_detail": found.get("train_detail", ""),
        }
    wanted = references.text(cell.attention, name, padded=cell.padded)
    if isinstance(wanted, Exception):
        return found | {"generate": "unsplit", "generate_detail": _said(wanted)}
    return found | _outcome("generate", text, disclosed)


def _outcome(what: str, action: Callable[[], str], disclosed: tuple[str, ...]) -> dict[str, str]:
    """Run `action`, which says what differs, and name what came of it.

    Raises:
        LeakError: It was refused for a tensor that can be disclosed and is not the text itself.
    """
    try:
        difference = action()
    except VflairError as error:
        named = isinstance(error, LeakError) and error.tensor not in {None, *TEXT, *disclosed}
        if named:
            raise
        return {what: "refused", f"{what}_detail": _said(error)}
    except Exception as error:  # noqa: BLE001 - that is what is looked for
        return {what: "error", f"{what}_detail": _said(error)}
    if difference:
        return {what: "wrong", f"{what}_detail": difference}
    if disclosed:
        return {what: "disclosed", f"{what}_detail": ", ".join(disclosed)}
    return {what: "exact"}


def _difference(
    expected: dict[str, Any], got: dict[str, Any], besides: set[str] = frozenset()
) -> str:  # type: ignore[assignment]
    """Say what differs; nothing if nothing does."""
    said = []
    if not _same(expected["loss"], got["loss"]):
        said.append(f"loss or tokens: {_largest(expected['loss'], got['loss'])}")
    pairs = list(zip(expected["logits"], got["logits"], strict=False))
    if len(expected["logits"]) != len(got["logits"]) or not all(_same(*pair) for pair in pairs):
        said.append(f"logits: {max((_largest(*pair) for pair in pairs), default='number')}")
    worst: dict[str, float] = {}
    # A bias of keys has no gradient but rounding: what is far below all others is measured against them.
    top = max(
        (float(g.abs().max()) for g in expected["gradients"].values() if g is not None), default=0
    )
    for name, gradient in expected["gradients"].items():
        if name not in besides:
            worst[name] = _apart(gradient, got["gradients"].get(name), top / 10)
    worst = {name: apart for name, apart in worst.items() if apart > TOLERANCE}
    if worst:
        name = max(worst, key=worst.__getitem__)
        said.append(f"{len(worst)} gradients, most {worst[name]:.2g} at {name}")
    return "; ".join(said)


def _same(expected: Tensor, got: Tensor) -> bool:
    if expected.shape != got.shape or expected.dtype != got.dtype:
        return False
    return bool(((expected == got) | (expected.isnan() & got.isnan())).all())


def _largest(expected: Tensor, got: Tensor) -> float:
    if expected.shape != got.shape:
        return float("inf")
    return float((expected.double() - got.double()).abs().nan_to_num(0, 0, 0).max())


def _apart(expected: Tensor | None, got: Tensor | None, least: float) -> float:
    if expected is None and got is None:
        return 0.0
    if expected is None or got is None:
        there = expected if got is None else got
        return float("inf") if there is not None and bool(there.any()) else 0.0
    if _same(expected, got):
        return 0.0
    return float((expected - got).abs().max() / expected.abs().max().clamp_min(max(least, 1e-30)))


def _tied_twins(whole: PreTrainedModel) -> set[str]:
    """Weights with more than one name: where a cut unties them, each owner has a part of the gradient."""
    names: dict[int, list[str]] = {}
    for name, parameter in whole.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name for group in names.values() if len(group) > 1 for name in group}


def _said(error: Exception) -> str:
    """Return type and first lines of `error`, and where in the code it was raised."""
    place, step = "", error.__traceback__
    while step is not None:
        place = f"{step.tb_frame.f_code.co_filename.rpartition('/')[2]}:{step.tb_lineno}"
        step = step.tb_next
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:300]} ({place})"
