"""Victims that share an update: a sum has no order, so a guess's rows go to the victims whom they fit best."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from vflair_core.experiments.grading.statistics import Hits


def matched(
    count: int, size: int, fit: Callable[[int, int], float], shift: int = 0
) -> list[tuple[int, int]]:
    """Pair the `count` rows of a guess with victims, and return (row, victim) in the order of the victims.

    Rows of one update, `size` of them, are paired with the victims of the update `shift` places further, one to one, so
    that the sum of `fit(row, victim)` is largest. Floors are paired in the same way, else they would be too low.
    """
    pairs = []
    for first in range(0, count, size):
        start = (first - shift * size) % count
        if size == 1:
            pairs.append((start, first))
            continue
        victims = range(first, first + size)
        scores = [[fit(row, victim) for victim in victims] for row in range(start, start + size)]
        pairs += [(start + row, first + n) for n, row in enumerate(best_assignment(scores))]
    return pairs


def best_assignment(scores: Sequence[Sequence[float]]) -> list[int]:
    """Return, for each column of a square table, its row, one to one and with the largest sum of scores.

    The Hungarian method by shortest augmenting paths, O(n³): Kuhn, "The Hungarian method for the assignment problem",
    1955; Jonker and Volgenant, "A shortest augmenting path algorithm for dense and sparse linear assignment
    problems", 1987.
    """
    size = len(scores)
    of_rows, of_columns = [0.0] * size, [0.0] * (size + 1)  # the potentials
    owner = [-1] * (
        size + 1
    )  # the row of each column; the last column stands for the row to be placed
    for new in range(size):
        owner[size], here = new, size
        slack, before, seen = [math.inf] * size, [size] * size, {size}
        while owner[here] >= 0:
            row = owner[here]
            for column in set(range(size)) - seen:
                left = -scores[row][column] - of_rows[row] - of_columns[column]
                if left < slack[column]:
                    slack[column], before[column] = left, here
            here = min(set(range(size)) - seen, key=lambda column: slack[column])
            step = slack[here]
            for column in seen:
                of_rows[owner[column]] += step
                of_columns[column] -= step
            slack = [value - step for value in slack]
            seen.add(here)
        while here != size:
            owner[here] = owner[before[here]]
            here = before[here]
    return owner[:size]


def together(hits: Hits, size: int) -> list[tuple[int, int]]:
    """Add up the hits of victims that share an update: they are right and wrong together, and drawn together."""
    groups = [hits[first : first + size] for first in range(0, len(hits), size)]
    return [(sum(h for h, _ in group), sum(n for _, n in group)) for group in groups]
