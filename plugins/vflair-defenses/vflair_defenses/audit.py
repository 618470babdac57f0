"""Measure from outside how well two inputs can be told apart: a lower bound of ε that no true claim lies below.

Jagielski, Ullman, Oprea, "Auditing Differentially Private Machine Learning", NeurIPS 2020, arXiv 2006.07709: a test
with true positive rate a and false positive rate b proves ε ≥ ln((a − δ)/b). Both rates are bounded by Clopper and
Pearson (Biometrika 26, 1934). The threshold is chosen on one half of the trials and judged on the other, so the
bound exceeds the true ε with probability at most the false alarm rate.
"""

from __future__ import annotations

import math

import attrs
import torch
from torch import Tensor

from vflair_core import Defense, DefenseError, Exchange

QUANTILES = 200


def audited_epsilon(
    defense: Defense,
    left: Tensor,
    right: Tensor,
    exchange: Exchange,
    *,
    trials: int,
    delta: float = 0.0,
    false_alarm: float = 1e-3,
) -> float:
    """Return a lower bound of the ε of one row, from `trials` releases of each of two rows (D,).

    The test is the likelihood ratio of the defense's own mechanism: the strongest there is, if it is right. Choose
    rows that are as far apart as the clip allows.

    Raises:
        DefenseError: The defense has no mechanism whose likelihood it knows.
    """
    mechanism = defense.mechanism()
    if mechanism is None or not mechanism.in_nats:
        raise DefenseError(
            f"{type(defense).__name__} has no mechanism with a likelihood. Score its releases yourself and call "
            "epsilon_lower_bound(left_scores, right_scores)."
        )
    scores = []
    for row in (left, right):
        there = attrs.evolve(exchange, memo={})
        sent = defense.on_smashed(row.expand(trials, 1, -1).clone(), there)[:, 0]
        scores.append(mechanism.log_likelihood(sent, left) - mechanism.log_likelihood(sent, right))
    return epsilon_lower_bound(scores[0], scores[1], delta=delta, false_alarm=false_alarm)


def epsilon_lower_bound(
    left: Tensor, right: Tensor, *, delta: float = 0.0, false_alarm: float = 1e-3
) -> float:
    """Return a lower bound of ε from scores (N,) under each of two inputs; the left one should score higher.

    Args:
        left: Scores of releases of one input.
        right: Scores of releases of the other.
        delta: δ of the claim.
        false_alarm: Probability that the bound lies above the true ε.
    """
    half = len(left) // 2, len(right) // 2
    levels = torch.linspace(0.002, 0.998, QUANTILES, dtype=torch.float64)
    tried = torch.cat([left[: half[0]], right[: half[1]]]).double().quantile(levels)  # (Q,)
    a, b = (
        1 - torch.searchsorted(scores.double().sort().values, tried) / len(scores)
        for scores in (left[: half[0]], right[: half[1]])
    )
    # Which threshold is judged is free to choose: normal limits do, and take no time.
    low = a - 3 * (a * (1 - a) / half[0]).sqrt() - delta
    high = b + 3 * (b * (1 - b) / half[1]).sqrt() + 3 / half[1]
    threshold = float(tried[(low.clamp_min(1e-12) / high).argmax()])
    rate = false_alarm / 2
    judged = left[half[0] :].double() >= threshold, right[half[1] :].double() >= threshold
    hits = _least(int(judged[0].sum()), len(judged[0]), rate)
    misses = _most(int(judged[1].sum()), len(judged[1]), rate)
    return max(math.log((hits - delta) / misses), 0.0) if hits > delta else 0.0


def _most(successes: int, trials: int, rate: float) -> float:
    """Upper Clopper-Pearson limit: the probability at which so few successes come up with probability `rate`."""
    if successes == trials:
        return 1.0
    low, high = successes / trials, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _at_most(successes, trials, middle) > rate else (low, middle)
    return high


def _least(successes: int, trials: int, rate: float) -> float:
    """Lower Clopper-Pearson limit, by symmetry."""
    return 1 - _most(trials - successes, trials, rate)


def _at_most(successes: int, trials: int, probability: float) -> float:
    """P(X ≤ successes) of a binomial, summed in logarithms."""
    k = torch.arange(successes + 1, dtype=torch.float64)
    n = torch.tensor(float(trials), dtype=torch.float64)
    ways = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    odds = k * math.log(probability) + (n - k) * math.log1p(-probability)
    return float((ways + odds).logsumexp(0).exp())
