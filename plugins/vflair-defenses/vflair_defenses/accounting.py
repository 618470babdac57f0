"""Privacy of the Gaussian mechanism, exactly.

Balle & Wang, "Improving the Gaussian Mechanism for Differential Privacy", ICML 2018, arXiv 1805.06530
(Theorem 8). A release with sensitivity Δ and noise σ has μ = Δ/σ; n of them compose to √n · μ
(Dong et al., "Gaussian Differential Privacy", arXiv 1905.02383).
"""

from __future__ import annotations

import functools
import math

import torch


def gaussian_delta(epsilon: float, mu: float) -> float:
    """δ(ε) = Φ(−ε/μ + μ/2) − e^ε Φ(−ε/μ − μ/2), computed in logarithms so that no ε overflows."""
    first = _log_normal_cdf(-epsilon / mu + mu / 2)
    second = epsilon + _log_normal_cdf(-epsilon / mu - mu / 2)
    return math.exp(first) * -math.expm1(min(second - first, 0.0))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Smallest ε with δ(ε) ≤ `delta`; infinite for infinite `mu`.

    Raises:
        ValueError: `delta` is not in (0, 1) or `mu` is negative.
    """
    if not 0 < delta < 1 or mu < 0:
        raise ValueError(f"delta must lie in (0, 1) and mu must be >= 0, not {delta} and {mu}.")
    if math.isinf(mu) or mu == 0:
        return mu
    low, high = 0.0, 1.0
    while gaussian_delta(high, mu) > delta:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if gaussian_delta(middle, mu) > delta else (low, middle)
    return high


@functools.cache
def gaussian_sigma(epsilon: float, delta: float) -> float:
    """Smallest σ/Δ for which one release is (ε, δ)-DP.

    Raises:
        ValueError: `epsilon` or `delta` is not positive.
    """
    if epsilon <= 0:
        raise ValueError(f"epsilon must be > 0, not {epsilon}.")
    low, high = 1e-9, 1.0
    while gaussian_epsilon(1 / high, delta) > epsilon:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if gaussian_epsilon(1 / middle, delta) > epsilon else (low, middle)
        )
    return high


def _log_normal_cdf(x: float) -> float:
    return float(torch.special.log_ndtr(torch.tensor(x, dtype=torch.float64)))
