"""Guesses of whatever kind against the truth: the grade of all, or how much of some victims is right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from vflair_core.attacks.attack import Guess
from vflair_core.experiments.grading.answer_key import AnswerKey
from vflair_core.experiments.grading.grades import Grade
from vflair_core.experiments.grading.labels import (
    grade_answers,
    grade_labels,
    grade_members,
    performance_apart,
)
from vflair_core.experiments.grading.statistics import pooled
from vflair_core.experiments.grading.tokens import checked_tokens, grade_tokens, token_hits
from vflair_core.experiments.grading.truth import Truth


def grade(
    guess: Guess,
    truth: Truth,
    prior: Tensor | None,
    decode: Any,
    *,
    name: str,
    knowledge: tuple[str, ...],
) -> Grade:
    """Grade a guess of whatever kind; `prior` and `decode` are for tokens.

    Raises:
        AttackError: The guess does not fit the victims, or there is no such truth.
    """
    if guess.tokens is not None:
        return grade_tokens(guess, truth, prior, decode, name=name, knowledge=knowledge)
    if guess.answers is not None:
        return grade_answers(guess, truth, name=name, knowledge=knowledge)
    if guess.members is not None:
        return grade_members(guess, truth, name=name, knowledge=knowledge)
    return grade_labels(guess, truth, name=name, knowledge=knowledge)


def performance(guess: Guess, truth: Truth, rows: Sequence[int]) -> float:
    """Attack performance on some victims only; `guess` has one row per chosen victim."""
    if guess.tokens is None:
        return performance_apart(guess, truth, rows)
    chosen = truth.of(rows)
    return pooled(token_hits(checked_tokens(guess, chosen), chosen))


def on_bypassed(guess: Guess, key: AnswerKey) -> float:
    """Attack performance on the victims that crossed again with the defense bypassed, of a guess of those only."""
    if key.control is None:
        return performance(guess, key.truth, key.subset)
    return performance(guess, key.control, range(len(key.subset)))
