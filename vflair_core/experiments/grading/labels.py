"""Grading of what is no token: labels, places of answers, membership."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from vflair_core.attacks.attack import Guess
from vflair_core.errors import AttackError
from vflair_core.experiments.grading.grades import Grade
from vflair_core.experiments.grading.matching import matched, together
from vflair_core.experiments.grading.statistics import (
    Floor,
    Hits,
    auc,
    auc_either,
    chance_of_no_more,
    interval,
    pooled,
)
from vflair_core.experiments.grading.truth import Truth


def grade_labels(guess: Guess, truth: Truth, *, name: str, knowledge: tuple[str, ...]) -> Grade:
    """Grade a guess of labels on victims whose label the attacker was not told; the floor is the largest class.

    Raises:
        AttackError: There are no labels to guess, or not one per victim.
    """
    guessed, labels = _labels(guess, truth, name)
    rows = [n for n in range(len(labels)) if n not in truth.known]
    guessed, labels = guessed[rows], labels[rows]
    details: dict[str, float] = {}
    if guess.scores is not None and truth.update_batch == 1:  # no rows, no ranks
        details = _ranking(guess.scores[rows], labels == guess.positive)
    size = truth.update_batch
    others = [_label_hits(guessed, labels, size, shift) for shift in range(1, len(labels) // size)]
    floors = {
        "constant": Floor(_constant(labels, size)),
        "mismatched": Floor.over(others, size),
    }
    hits = _label_hits(guessed, labels, size)
    return _grade("labels", hits, floors, details, guess, name, knowledge, size)


def grade_answers(guess: Guess, truth: Truth, *, name: str, knowledge: tuple[str, ...]) -> Grade:
    """Grade a guess of which positions hold an answer; the floor is to say the same of all positions.

    Raises:
        AttackError: The guess has not one row per victim.
    """
    hits, size = _answer_hits(guess, truth), truth.update_batch
    marked = [(int(there.sum()), len(there)) for there in truth.answers]
    unmarked = [(count - some, count) for some, count in marked]
    shifts = range(1, len(truth.answers) // size)
    others = [_answer_hits(guess, truth, shift) for shift in shifts]
    floors = {
        "constant": Floor.over([max(marked, unmarked, key=pooled)], size),
        "mismatched": Floor.over(others, size),
    }
    return _grade("answers", hits, floors, {}, guess, name, knowledge, size)


def grade_members(guess: Guess, truth: Truth, *, name: str, knowledge: tuple[str, ...]) -> Grade:
    """Grade a guess of which candidates are victims: a candidate scored above 0 is called one.

    The floor is to call all candidates the same; permuted candidates are the negative control.

    Raises:
        AttackError: There are no candidates, or not one score for each.
    """
    called, members = _members(guess, truth, name)
    assert guess.members is not None  # _members has checked it
    all_in, all_out = (_hits(torch.full_like(members, said), members) for said in (True, False))
    others = [_hits(called, members.roll(shift)) for shift in range(1, len(members))]
    floors = {
        "constant": Floor.over([max(all_in, all_out, key=pooled)]),
        "mismatched": Floor.over(others),
    }
    details = _ranking(guess.members, members)
    return _grade("members", _hits(called, members), floors, details, guess, name, knowledge)


def performance_apart(guess: Guess, truth: Truth, rows: Sequence[int]) -> float:
    """Performance of a guess of labels, answers or members on some victims; it has one row per chosen victim."""
    chosen = list(rows)
    if guess.answers is not None:
        answers = [truth.answers[n] for n in chosen]
        return pooled(_answer_hits(guess, attrs.evolve(truth, answers=answers)))
    if guess.members is not None:
        called, _ = _members(guess, truth, "this attack")
        assert truth.members is not None  # _members has checked it
        crossed = torch.isin(truth.members, torch.tensor(chosen))
        counted = crossed | (truth.members < 0)  # other victims did not cross
        return pooled(_hits(called[counted], crossed[counted]))
    some = attrs.evolve(truth, labels=None if truth.labels is None else truth.labels[chosen])
    guessed, labels = _labels(guess, some, "this attack")
    graded = [n for n, row in enumerate(chosen) if row not in truth.known]
    return pooled(_label_hits(guessed[graded], labels[graded], truth.update_batch))


def _labels(guess: Guess, truth: Truth, name: str) -> tuple[Tensor, Tensor]:
    if truth.labels is None:
        raise AttackError(f"{name} guesses labels, and this task has none.")
    guessed = guess.labels if guess.labels is not None else (guess.scores > 0).long()  # type: ignore[operator, union-attr]
    if guessed.shape != truth.labels.shape:
        raise AttackError(
            f"{name} returned labels of shape {tuple(guessed.shape)} for {len(truth.labels)} victims."
        )
    return guessed, truth.labels


def _members(guess: Guess, truth: Truth, name: str) -> tuple[Tensor, Tensor]:
    if truth.members is None:
        raise AttackError(f"{name} guesses membership, and there are no candidates.")
    if guess.members is None or guess.members.shape != truth.members.shape:
        raise AttackError(f"{name} must score each of the {len(truth.members)} candidates.")
    return guess.members > 0, truth.members >= 0


def _answer_hits(guess: Guess, truth: Truth, shift: int = 0) -> Hits:
    """Count positions that were called right, of victims `shift` updates further on."""
    if guess.answers is None or len(guess.answers) != len(truth.answers):
        there = 0 if guess.answers is None else len(guess.answers)
        raise AttackError(
            f"The attack marked answers in {there} of {len(truth.answers)} victims. Bare texts have no answers: "
            "this guess needs a task of prompts and answers."
        )
    rows, answers = guess.answers, truth.answers
    size = truth.update_batch
    pairs = matched(len(rows), size, lambda row, n: _overlap(rows[row], answers[n])[0], shift)
    return [_overlap(rows[row], answers[n]) for row, n in pairs]


def _overlap(guessed: Tensor, there: Tensor) -> tuple[int, int]:
    """Count positions of one victim that were called right; those beyond the guess are called no answer."""
    called = torch.zeros_like(there)
    called[: len(guessed)] = guessed[: len(there)]
    return int((called == there).sum()), len(there)


def _ranking(scores: Tensor, positive: Tensor) -> dict[str, float]:
    """AUC as the attack orients it; beside it the better orientation, which chance lifts, and its null."""
    if bool(positive.all()) or not bool(positive.any()):
        return {}
    either, null = auc_either(scores, positive.long())
    return {
        "auc": auc(scores, positive.long()),
        "auc_either_way": either,
        "auc_either_way_null": null,
    }


def _label_hits(guessed: Tensor, labels: Tensor, size: int, shift: int = 0) -> Hits:
    """Count right labels; those of one update are in no order, so each goes to the victim whom it fits."""
    pairs = matched(len(labels), size, lambda row, n: float(guessed[row] == labels[n]), shift)
    return [(int(guessed[row] == labels[n]), 1) for row, n in pairs]


def _constant(labels: Tensor, size: int) -> tuple[int, ...]:
    """How many the best labels that are the same for every update get right in each: of one, the largest class.

    With c(u) victims of a class in update u, naming it m times gets Σ_u min(c(u), m). That is concave in m, so the best
    choice takes one label after the other, each time the one that adds most.
    """
    counts = torch.stack(
        [torch.bincount(u, minlength=int(labels.max()) + 1) for u in labels.split(size)]
    )
    said = torch.zeros_like(counts[0])
    for _ in range(size):
        gains = (counts > said).sum(0)  # (C,)
        said[gains.argmax()] += 1
    return tuple(torch.minimum(counts, said).sum(1).tolist())


def _hits(guessed: Tensor, labels: Tensor) -> list[tuple[int, int]]:
    return [(int(hit), 1) for hit in (guessed == labels).tolist()]


def _grade(
    target: str,
    hits: Hits,
    each: dict[str, Floor],
    details: dict[str, float],
    guess: Guess,
    name: str,
    knowledge: tuple[str, ...],
    size: int = 1,
) -> Grade:
    drawn = together(hits, size)
    count = sum(of for _, of in drawn)
    floors = {which: floor.rate(count) for which, floor in each.items()}
    best = each[max(floors, key=lambda which: floors[which])]
    return Grade(
        name, knowledge, target, pooled(drawn), interval(drawn), max(floors.values()), floors, details,
        negative_control=floors["mismatched"], budget=dict(guess.budget or {}), hits=drawn,
        by_chance=chance_of_no_more(drawn, best),
    )  # fmt: skip
