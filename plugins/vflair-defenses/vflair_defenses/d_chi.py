"""Metric differential privacy: noise whose density falls with the Euclidean distance, exp(−η‖n‖)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vflair_core import Exchange, Guarantee


def distance_noise(rows: Tensor, eta: float, exchange: Exchange) -> Tensor:  # (..., D)
    """Draw n = r·u for each row: u uniform on the sphere, r ~ Gamma(D, 1/η), which has density ∝ exp(−η‖n‖).

    Wu et al., "Bolt-on Differential Privacy", SIGMOD 2017, arXiv 1606.04722, Appendix E; for text: Feyisetan et al.,
    arXiv 1910.08902. r is the sum of D exponentials. Mean length D/η.
    """
    direction = torch.randn(rows.shape, generator=exchange.generator)
    waits = torch.empty(rows.shape).exponential_(generator=exchange.generator)
    radius = waits.sum(-1, keepdim=True) / eta
    noise = radius * direction / direction.norm(dim=-1, keepdim=True)
    return noise.to(rows.device)


def spread_of(rows: Tensor, *, pairs: int = 4096) -> tuple[float, float]:
    """Return the median distance of two rows, of a sample of pairs, and an upper bound of the largest.

    The bound is twice the largest distance to the mean.
    """
    exact = rows.detach().float()
    generator = torch.Generator().manual_seed(0)  # which pairs are looked at is no secret
    first, second = torch.randint(len(exact), (2, pairs), generator=generator)
    apart = first != second
    distances = (exact[first[apart]] - exact[second[apart]]).norm(dim=-1)
    return float(distances.median()), 2 * float((exact - exact.mean(0)).norm(dim=-1).max())


def metric_guarantee(
    what: str, eta: float, median: float, largest: float, releases: int, excluded: str = ""
) -> Guarantee:
    """State η·d for units at the median and at the largest distance, added up over all releases."""
    if math.isinf(eta):
        return Guarantee()
    outside = "gradients sent in training, lengths, timing and floating-point sampling"
    return Guarantee(
        mechanism=f"d_chi noise on {what}",
        adjacency=f"replace the text of one example; each of its {what} is one release and costs eta times its distance",
        clip=None,
        sensitivity=largest,
        noise=None,
        delta=0.0,
        epsilon_per_release=eta * largest,
        releases=releases,
        epsilon=eta * largest * releases,
        typical=eta * median * releases,
        excluded=f"{excluded}, {outside}" if excluded else outside,
        randomness="the data party's torch generator: from the operating system unless seeded",
    )
