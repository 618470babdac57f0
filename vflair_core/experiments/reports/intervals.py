"""Intervals over seeds and victims: the one place where the report asks for them."""

from __future__ import annotations

from collections.abc import Sequence

from vflair_core.experiments.grading.grades import Grade
from vflair_core.experiments.grading.pooling import paired_change, pooled_performance


def interval_over_seeds(grades: Sequence[Grade]) -> tuple[float, float]:
    """Return the 95 % interval of the mean attack performance of one attack, one grade for each seed.

    Grades without hits leave the union of the seeds' own intervals, which is wider than need be.
    """
    if len(grades) == 1:
        return grades[0].interval
    if not all(grade.hits for grade in grades):
        return min(g.interval[0] for g in grades), max(g.interval[1] for g in grades)
    return pooled_performance(grades, same_victims=_same_victims(grades)).interval


def change_over_seeds(
    before: Sequence[Grade], after: Sequence[Grade]
) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean change from `before` to `after`, paired by seed and victim.

    None where it cannot be made: of a single seed, or without the hits of the same victims on both sides.
    """
    pairs = [(a.hits, b.hits) for a, b in zip(before, after, strict=True)]
    if len(pairs) < 2 or not all(a and len(a) == len(b) for a, b in pairs):
        return None
    same = _same_victims([*before, *after])
    return paired_change(before, after, same_victims=same).interval


def _same_victims(grades: Sequence[Grade]) -> bool:
    """Whether seeds attacked as many victims: seeds share the texts of their task."""
    return len({len(grade.hits) for grade in grades}) == 1
