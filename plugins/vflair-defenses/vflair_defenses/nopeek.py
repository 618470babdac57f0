"""Charge the training loss for the distance correlation of embeddings and smashed data."""

from __future__ import annotations

import torch
from attrs import define, field, validators
from torch import Tensor

from vflair_core import Defense, DefenseError, Exchange
from vflair_defenses.rows import real_rows


@define(slots=False)
class NoPeek(Defense):
    """Add α · dCor(E(x), H) over the rows of a batch to the training loss.

    Vepakomma et al., "NoPeek: Information leakage reduction to share activations in distributed deep learning",
    arXiv 2008.09161; distance correlation: Székely et al., Annals of Statistics 35 (2007). Differs from the paper:
    rows are tokens, not images, and the embeddings are held fixed, so that the head must change. What crosses is
    the head's own output: empirical, and low distance correlation is compatible with perfect reconstruction (Thomas
    et al., arXiv 2505.18332, Theorem 2).

    Attributes:
        weight: α; 0 adds nothing.
        most: Rows of a batch that are compared, the first ones: memory grows with their square.
    """

    weight: float = field(default=1.0, validator=validators.ge(0))
    most: int = field(default=512, validator=validators.ge(2))

    covers = frozenset()
    supports = frozenset(
        {
            ("*", kind, "*")
            for kind in ("causal-lm", "classification", "regression", "question-answering")
        }
    )

    def on_embeddings(self, embeddings: Tensor, exchange: Exchange) -> Tensor:  # (B, T, D)
        if exchange.phase == "train":
            exchange.memo["nopeek embeddings"] = embeddings.detach()
        return embeddings

    def on_smashed(self, smashed: Tensor, exchange: Exchange) -> Tensor:  # (B, T, D)
        if exchange.phase == "train":
            exchange.memo["nopeek smashed"] = real_rows(smashed, exchange)[: self.most]
            before = exchange.memo.get("nopeek embeddings")
            if before is None or before.shape[:2] != smashed.shape[:2]:
                raise DefenseError(
                    "NoPeek compares each row with the embedding of its token, and here they do not correspond. "
                    "Use another cut or another defense."
                )
            exchange.memo["nopeek embeddings"] = real_rows(before, exchange)[: self.most]
        return smashed

    def penalty(self, exchange: Exchange) -> Tensor | None:
        if not self.weight:
            return None
        before, after = exchange.memo["nopeek embeddings"], exchange.memo["nopeek smashed"]
        return self.weight * distance_correlation(before.float(), after.float())


def distance_correlation(x: Tensor, y: Tensor) -> Tensor:  # (N, D), (N, E) -> ()
    """Sample distance correlation √(dCov²(x, y) / √(dVar(x)·dVar(y))), in [0, 1]; 0 where one does not vary."""
    a, b = _centred_distances(x), _centred_distances(y)
    covariance = (a * b).mean()
    scale = ((a * a).mean() * (b * b).mean()).sqrt()
    return (covariance.clamp_min(1e-12) / scale.clamp_min(1e-12)).sqrt()


def _centred_distances(rows: Tensor) -> Tensor:
    # By differences: products would leave the diagonal off zero, where the root is steepest.
    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    means = distances.mean(0)
    return distances - means[None] - means[:, None] + means.mean()
