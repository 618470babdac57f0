"""Cutting a list of scores in two."""

from __future__ import annotations

import torch
from torch import Tensor


def two_means(scores: Tensor) -> Tensor:
    """Say of each score (N,) whether it belongs to the upper of two clusters, (N,) bool.

    Exact 2-means: of all cuts of the sorted scores, the one with the least squared distance to the two means.
    """
    ranked, order = scores.double().sort()
    count = torch.arange(1, len(ranked), device=scores.device)
    below = ranked.cumsum(0)[:-1]
    above = ranked.sum() - below
    # Least squares within is most squares between.
    between = below.square() / count + above.square() / (len(ranked) - count)
    cut = int(between.argmax()) + 1
    upper = torch.zeros(len(ranked), dtype=torch.bool, device=scores.device)
    upper[order[cut:]] = True
    return upper
