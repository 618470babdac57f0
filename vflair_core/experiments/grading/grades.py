"""The verdict on an attack: its controls, and what it reached where nothing defends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attrs import frozen
from torch import Tensor

from vflair_core.attacks.attack import Guess
from vflair_core.experiments.grading.labels import (
    grade_answers,
    grade_labels,
    grade_members,
    performance_apart,
)
from vflair_core.experiments.grading.statistics import pooled
from vflair_core.experiments.grading.tokens import Grade, checked_tokens, grade_tokens, token_hits
from vflair_core.experiments.grading.truth import Truth


def grade(
    guess: Guess, truth: Truth, prior: Tensor | None, decode: Any, *, name: str, knowledge: str
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


@frozen
class Reference:
    """What the same attack reached in the undefended arm, on the victims that cross again bypassed."""

    performance: float
    informative: bool


def judge(grade: Grade, reference: Reference | None, bypassed: float | None) -> Grade:
    """Add the controls' verdict to a grade.

    `bypassed` is the attack's performance on messages of this run sent with the defense bypassed, on the same
    victims as `reference`; both are None in the undefended arm.
    """
    grade.positive_control = bypassed
    others = max(grade.floors.get(name, 0.0) for name in ("constant", "prior", "others"))
    undefended = grade.attack_performance if reference is None else reference.performance
    low, _ = grade.interval
    if grade.negative_control is not None and grade.negative_control > others + 0.1:
        grade.verdict = (
            f"negative control failed: {grade.negative_control:.3f} on other examples' messages"
        )
    elif bypassed is not None and bypassed < 0.95 * undefended:
        grade.verdict = (
            f"positive control failed: {bypassed:.3f} with the defense bypassed against {undefended:.3f} "
            "undefended, so the drop is not the defense's alone"
        )
    grade.informative = low > grade.floor if reference is None else reference.informative
    if grade.verdict == "ok" and not grade.informative:
        grade.verdict = "attack uninformative: it is at the floor without a defense"
    return grade


def performance(guess: Guess, truth: Truth, rows: Sequence[int]) -> float:
    """Attack performance on some victims only; `guess` has one row per chosen victim."""
    if guess.tokens is None:
        return performance_apart(guess, truth, rows)
    chosen = truth.of(rows)
    return pooled(token_hits(checked_tokens(guess, chosen), chosen))
