"""Grading of what is no token: labels, places of answers, membership."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vflair_core.attack import Guess
from vflair_core.errors import AttackError
from vflair_core.grading import Grade, Truth
from vflair_core.measures import Hits, auc, auc_either, interval, mean_over_shifts, pooled


def grade_labels(guess: Guess, truth: Truth, *, name: str, knowledge: str) -> Grade:
    """Grade a guess of labels on victims whose label the attacker was not told; the floor is the largest class.

    Raises:
        AttackError: There are no labels to guess, or not one per victim.
    """
    guessed, labels = _labels(guess, truth, name)
    rows = [n for n in range(len(labels)) if n not in truth.known]
    guessed, labels = guessed[rows], labels[rows]
    details: dict[str, float] = {}
    if guess.scores is not None:
        details = _ranking(guess.scores[rows], labels == guess.positive)
    rolled = mean_over_shifts(
        [_hits(guessed, labels.roll(shift)) for shift in range(1, len(labels))]
    )
    largest = max(torch.bincount(labels).tolist()) / len(labels)
    floors = {"constant": largest, "mismatched": rolled}
    return _grade("labels", _hits(guessed, labels), floors, details, guess, name, knowledge)


def grade_answers(guess: Guess, truth: Truth, *, name: str, knowledge: str) -> Grade:
    """Grade a guess of which positions hold an answer; the floor is to say the same of all positions.

    Raises:
        AttackError: The guess has not one row per victim.
    """
    hits = _answer_hits(guess, truth)
    share = pooled([(int(there.sum()), len(there)) for there in truth.answers])
    floors = {"constant": max(share, 1 - share)}
    count, shifts = len(truth.answers), []
    for shift in range(1, count):
        others = [truth.answers[(n + shift) % count] for n in range(count)]
        shifts.append(_overlap(guess.answers, others))
    floors["mismatched"] = mean_over_shifts(shifts)
    return _grade("answers", hits, floors, {}, guess, name, knowledge)


def grade_members(guess: Guess, truth: Truth, *, name: str, knowledge: str) -> Grade:
    """Grade a guess of which candidates are victims: a candidate scored above 0 is called one.

    The floor is to call all candidates the same; permuted candidates are the negative control.

    Raises:
        AttackError: There are no candidates, or not one score for each.
    """
    called, members = _members(guess, truth, name)
    assert guess.members is not None  # _members has checked it
    floors = {
        "constant": max(float(members.double().mean()), float((~members).double().mean())),
        "mismatched": mean_over_shifts(
            [_hits(called, members.roll(shift)) for shift in range(1, len(members))]
        ),
    }
    details = _ranking(guess.members, members)
    return _grade("members", _hits(called, members), floors, details, guess, name, knowledge)


def performance_apart(guess: Guess, truth: Truth, rows: Sequence[int]) -> float:
    """Performance of a guess of labels, answers or members on some victims; it has one row per chosen victim."""
    chosen = list(rows)
    if guess.answers is not None:
        return pooled(
            _answer_hits(guess, Truth([], [], answers=[truth.answers[n] for n in chosen]))
        )
    if guess.members is not None:
        called, _ = _members(guess, truth, "this attack")
        assert truth.members is not None  # _members has checked it
        there = torch.isin(truth.members, torch.tensor(chosen))
        counted = there | (truth.members < 0)  # other victims did not cross
        return pooled(_hits(called[counted], there[counted]))
    some = Truth([], [], labels=None if truth.labels is None else truth.labels[chosen])
    guessed, labels = _labels(guess, some, "this attack")
    graded = [n for n, row in enumerate(chosen) if row not in truth.known]
    return pooled(_hits(guessed[graded], labels[graded]))


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


def _answer_hits(guess: Guess, truth: Truth) -> Hits:
    if guess.answers is None or len(guess.answers) != len(truth.answers):
        there = 0 if guess.answers is None else len(guess.answers)
        raise AttackError(
            f"The attack marked answers in {there} of {len(truth.answers)} victims. Bare texts have no answers: "
            "this guess needs a task of prompts and answers."
        )
    return _overlap(guess.answers, truth.answers)


def _overlap(guessed: Tensor | None, true: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Count positions that were called right; positions beyond the guess are called no answer."""
    assert guessed is not None  # _answer_hits has checked it
    counts = []
    for row, there in zip(guessed, true, strict=True):
        called = torch.zeros_like(there)
        called[: len(row)] = row[: len(there)]
        counts.append((int((called == there).sum()), len(there)))
    return counts


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


def _hits(guessed: Tensor, labels: Tensor) -> list[tuple[int, int]]:
    return [(int(hit), 1) for hit in (guessed == labels).tolist()]


def _grade(
    target: str,
    hits: Hits,
    floors: dict[str, float],
    details: dict[str, float],
    guess: Guess,
    name: str,
    knowledge: str,
) -> Grade:
    return Grade(
        name, knowledge, target, pooled(hits), interval(hits), max(floors.values()), floors, details,
        negative_control=floors["mismatched"], budget=dict(guess.budget or {}),
    )  # fmt: skip
