"""What every attack owes: `assert_attack_contract` tries it on rows that crossed a small model."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import torch
from torch import Tensor, nn

from vflair_core.attacks.attack import Guess, Launch, check, launch, wants
from vflair_core.attacks.evidence import save_evidence
from vflair_core.attacks.grants import GrantedKnowledge
from vflair_core.attacks.guess_files import read_guess
from vflair_core.attacks.halves import Head, Tail
from vflair_core.attacks.knowledge import VOCABULARY
from vflair_core.attacks.scratch import scratch_folder
from vflair_core.attacks.worker import run_worker
from vflair_core.attacks.workspace import Workspace, write_workspace
from vflair_core.offers import load_target, options_of, target_of
from vflair_core.testing.crossing import evidence_of, of_training
from vflair_core.testing.models import FIRST_WORD

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from transformers import PreTrainedModel

    from vflair_core.partition.partition import Partition

NAME = "attack under test"


def assert_attack_contract(
    attack: Callable[..., Any],
    *,
    model: PreTrainedModel | None = None,
    partition: Partition | None = None,
    rows: Sequence[Tensor] | None = None,
    reads: float = 0.0,
    **crossing: Any,
) -> Guess:
    """See that an attack keeps the rules of docs/plugins.md; return its guess.

    Every name of the vocabulary is granted. It must ask for no other; be importable by name, since it runs in a process of
    its own; give the same guess there and here, whatever it guessed before and whatever numbers Python's and NumPy's global
    generators give; change nothing that it was given; and guess one row for each victim, in range.

    Args:
        attack: A function, an attrs object with options, or its class.
        model: What the rows cross; left out, a llama of four blocks and 64 words. One with classes is labelled by class.
        partition: The cut; left out, one block in front and one behind.
        rows: Token ids (T,) of each victim; left out, three rows of seven words.
        reads: Of all tokens (or classes), the share that it must at least guess right here.
        crossing: Further options of `crossed`: defenses, current, adversary_state, …

    Raises:
        AssertionError: It breaks a rule; it says which.
        AttackError: It asks for what does not exist, or returns no `Guess`.
    """
    called = _made(attack)
    target = target_of(called)
    name = target.rpartition(":")[2]
    check(called, VOCABULARY)
    _importable(called, target, name)
    model, partition, rows, labels = of_training(model, partition, rows)
    crossing = {"labels": labels, **crossing}
    needed, optional = wants(called)
    job = Launch(NAME, called, (*needed, *optional))
    others = [(row - FIRST_WORD + 1) % (_words(model) - FIRST_WORD) + FIRST_WORD for row in rows]
    with scratch_folder() as scratch:
        evidence = evidence_of(model, partition, rows, **crossing)
        save_evidence(scratch / "store", evidence)
        save_evidence(scratch / "others", evidence_of(model, partition, others, **crossing))
        first = _here(scratch, "store", job, 1, name)
        elsewhere = _here(scratch, "others", job, 1, name)
        again = _here(scratch, "store", job, 2, name)
        _equal(
            first,
            again,
            f"{name} guesses otherwise where Python or NumPy draw other numbers: draw from `generator`.",
        )
        there = _elsewhere(scratch, "others", job)
        _equal(
            elsewhere,
            there,
            f"{name} guesses otherwise in a process of its own: it depends on something of this one, or on what it guessed "
            "before.",
        )
    candidates = len(evidence.auxiliary["candidates"])
    classes = int(model.config.num_labels or 2)
    _in_range(first, rows, {"tokens": _words(model), "labels": classes}, candidates, name)
    right = _right(first, rows, crossing["labels"])
    if right < reads:
        raise AssertionError(f"{name} reads {right:.2f} where {reads:.2f} was to be read.")
    return first


def _made(attack: Any) -> Any:
    """An attack that can be called, with options that can be written down."""
    if not isinstance(attack, type):
        called = attack
    else:
        try:
            called = attack()
        except TypeError as error:
            raise AssertionError(
                f"{attack.__name__} needs options ({error}): give an object that has them, {attack.__name__}(...)."
            ) from error
    try:
        json.dumps(options_of(called) or {})
    except TypeError as error:
        raise AssertionError(
            f"The options of {type(called).__name__} are nothing that JSON can hold, and a process of its own could not "
            f"have them: {error}."
        ) from error
    return called


def _words(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config().vocab_size)


def _importable(called: Any, target: str, name: str) -> None:
    try:
        found = load_target(target)
    except Exception as error:
        raise AssertionError(
            f"{name} cannot be imported as {target!r} ({error}): put it at the top level of a module."
        ) from error
    if found is not called and found is not type(called):
        raise AssertionError(f"{target!r} is not {name} but something else of that name.")


THERE = {  # what there is only of some crossings, and what makes it
    "known_labels": 'a model with classes: model=tiny_model("bert", "classification")',
    "logits": "HT: partition=Partition(head, 0)",
    "tail": "HBT: partition=Partition(head, tail)",
    "pretrained_tail": "HBT: partition=Partition(head, tail)",
    "current_tail": "HBT: partition=Partition(head, tail)",
    "mechanism": "a defense that has one: defenses=[...]",
    "gradient_mechanism": "a defense that has one: defenses=[...]",
    "replacement": "a defense that has one: defenses=[...]",
    "parameters": "a defense that has a mechanism: defenses=[...]",
    "adversary_state": "what an active adversary kept: adversary_state={...}",
}


def _here(scratch: Path, store: str, job: Launch, seed: int, name: str) -> Guess:
    """Guess in this process, with other numbers of Python's and NumPy's for each seed."""
    folder = scratch / f"granted-{store}-{seed}"
    folder.mkdir()
    write_workspace(folder, scratch / store, [job], torch.get_num_threads(), torch.device("cpu"))
    workspace = Workspace(folder)
    (described,) = workspace.job["attacks"]
    granted = GrantedKnowledge(workspace, described, "main", lambda *_: None)
    absent = [each for each in job.required if each not in granted]
    if absent:
        cures = "; ".join(f"{each} needs {THERE.get(each, 'labels')}" for each in absent)
        raise AssertionError(f"{name} asks for what this crossing has not: {cures}.")
    knowledge = {key: granted[key] for key in granted if key in job.asked}
    before = _contents(knowledge)
    with torch.random.fork_rng(), _other_numbers(seed):
        torch.manual_seed(described["seed"])  # as the process of an attack does
        guess = launch(job.attack, knowledge)
    after = _contents(knowledge)
    changed = [key for key in before if not _same(before[key], after[key])]
    if changed:
        raise AssertionError(
            f"{name} changes what it is given ({', '.join(changed)}): whoever comes next gets it too. Copy first."
        )
    return guess


@contextmanager
def _other_numbers(seed: int) -> Iterator[None]:
    """While this lasts, Python and NumPy draw other numbers for each seed."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - what an attack may draw from by mistake
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def _elsewhere(scratch: Path, store: str, job: Launch) -> Guess:
    folder = scratch / "worker"
    folder.mkdir()
    write_workspace(folder, scratch / store, [job], 1, torch.device("cpu"))
    run_worker(folder, "process", lambda *_: None)
    return read_guess(folder / "guess-0-main").guess


def _contents(value: Any) -> Any:
    """What is in a value that an attack was given: tensors and weights copied, wherever they lie."""
    match value:
        case Tensor():
            return value.detach().clone()
        case nn.Module():
            return {key: weight.detach().clone() for key, weight in value.state_dict().items()}
        case Head() | Tail():
            return _contents(value._party.model)  # noqa: SLF001 - whose weights they compute with
        case Mapping():
            return {key: _contents(each) for key, each in value.items()}
        case list() | tuple():
            return [_contents(each) for each in value]
        case _ if attrs.has(type(value)):
            names = [f.name for f in attrs.fields(type(value))]
            return {name: _contents(getattr(value, name)) for name in names}
        case str() | int() | float() | bytes() | None:
            return value
        case _:
            return None


def _same(one: Any, other: Any) -> bool:
    match one:
        case Tensor():
            return (
                isinstance(other, Tensor)
                and one.shape == other.shape
                and torch.equal(one.nan_to_num(), other.nan_to_num())
            )
        case dict():
            return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
        case list():
            return len(one) == len(other) and all(map(_same, one, other))
        case _:
            return bool(one == other)


def _equal(one: Guess, other: Guess, otherwise: str) -> None:
    ours, theirs = one.tensors, other.tensors
    if ours.keys() != theirs.keys() or not all(
        ours[key].shape == theirs[key].shape
        and torch.allclose(
            ours[key].double(), theirs[key].double(), rtol=1e-4, atol=1e-6, equal_nan=True
        )
        for key in ours
    ):
        raise AssertionError(otherwise)


def _in_range(
    guess: Guess, rows: Sequence[Tensor], above: Mapping[str, int], candidates: int, name: str
) -> None:
    longest = max(map(len, rows))
    for key, value in guess.tensors.items():
        wanted, what = (candidates, "candidates") if key == "members" else (len(rows), "victims")
        if len(value) != wanted:
            raise AssertionError(f"{name} guesses {key} for {len(value)} {what} of {wanted}.")
        if key in ("tokens", "answers") and value.shape[1:] != (longest,):
            raise AssertionError(
                f"{name} guesses {key} of shape {tuple(value.shape)} for victims of up to {longest} positions: fill up with -1."
            )
        if value.is_floating_point() and bool(value.isnan().any()):
            raise AssertionError(f"{name} guesses {key} that are not a number.")
        if key in above and not bool(((value >= -1) & (value < above[key])).all()):
            raise AssertionError(f"{name} guesses {key} outside of -1 to {above[key] - 1}.")


def _right(guess: Guess, rows: Sequence[Tensor], labels: Sequence[Tensor] | None) -> float:
    """The share of tokens, or of classes, that is guessed right."""
    if guess.tokens is not None:
        hits = [(guess.tokens[n, : len(row)] == row).float().mean() for n, row in enumerate(rows)]
        return float(torch.stack(hits).mean())
    if guess.labels is not None and labels and all(label.numel() == 1 for label in labels):
        return float((guess.labels == torch.stack(list(labels)).flatten()).float().mean())
    return 0.0
