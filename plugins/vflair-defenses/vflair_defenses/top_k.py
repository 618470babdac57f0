"""Randomised top-k: mostly the largest coordinates, sometimes others."""

from __future__ import annotations

import attrs
import torch
from attrs import define, field, validators
from torch import Tensor

from vflair_core import Defense, Exchange, Mechanism
from vflair_defenses.sparsification import keep_largest, sparse_bytes


@define(slots=False)
class TopK(Defense):
    """Keep k coordinates of each row; each is one of the k largest with probability 1 − α, else any other.

    Zheng et al., "Reducing Communication for Split Learning by Randomized Top-k Sparsification", IJCAI 2023,
    arXiv 2305.18469. In evaluation the k largest are kept, as in the paper. A means to save bytes and to
    generalise; as a defense it is empirical: what is kept is exact.

    Attributes:
        k: Coordinates kept of each row; 0 keeps all.
        alpha: Probability that a kept coordinate is not one of the k largest, in training.
    """

    k: int = field(default=16, validator=validators.ge(0))
    alpha: float = field(default=0.1, validator=[validators.ge(0), validators.le(1)])

    covers = frozenset({"prompt", "response"})
    axes = frozenset({"BTD", "TBD", "BD"})

    def on_smashed(self, smashed: Tensor, exchange: Exchange) -> Tensor:  # (..., D)
        width = smashed.shape[-1]
        if not 0 < self.k < width:
            return smashed
        if exchange.phase != "train" or not self.alpha:
            return keep_largest(smashed, self.k)
        return smashed * _chosen(smashed.detach(), self.k, self.alpha, exchange.generator)

    def bytes_per_row(self, width: int, value_bytes: int = 4) -> int:
        """What a sparse row would take on the wire: values and indices. Channels send rows dense today."""
        return sparse_bytes(self.k or width, width, value_bytes)

    def mechanism(self) -> Mechanism:
        return TopKMechanism(self.k, self.alpha)


def _chosen(rows: Tensor, k: int, alpha: float, generator: torch.Generator | None) -> Tensor:
    """A 0/1 mask with k ones a row: how many are outsiders is binomial, which of each group is uniform."""
    width = rows.shape[-1]
    largest = keep_largest(rows.abs() + 1e-30, k) != 0  # zeros count too
    trials = torch.rand((*rows.shape[:-1], k), generator=generator).to(rows.device)
    outsiders = (trials < alpha).sum(-1, keepdim=True).clamp(max=width - k)
    order = torch.rand(rows.shape, generator=generator).to(rows.device)
    rank_in = order.masked_fill(~largest, 2.0).argsort(-1).argsort(-1)
    rank_out = order.masked_fill(largest, 2.0).argsort(-1).argsort(-1)
    kept = torch.where(largest, rank_in < k - outsiders, rank_out < outsiders)
    return kept.to(rows.dtype)


@attrs.frozen
class TopKMechanism(Mechanism):
    """What is kept is exact, so a candidate is compared on the coordinates that were sent."""

    k: int
    alpha: float

    def inference(self) -> Mechanism:
        return TopKMechanism(self.k, 0.0)

    def expected(self, hidden: Tensor) -> Tensor:
        return keep_largest(hidden, self.k) if self.k else hidden

    def log_likelihood(self, observed: Tensor, hidden: Tensor) -> Tensor:
        return -((observed - hidden) * (observed != 0)).square().sum(-1)

    def sample(self, hidden: Tensor, generator: torch.Generator) -> Tensor:
        if not (0 < self.k < hidden.shape[-1] and self.alpha):
            return self.expected(hidden)
        return hidden * _chosen(hidden, self.k, self.alpha, generator)
