"""Keep the largest coordinates of each row: cheap to send, and no protection by itself."""

from __future__ import annotations

import attrs
import torch
from attrs import define, field, validators
from torch import Tensor

from vflair_core import Defense, Exchange, Mechanism


@define(slots=False)
class Sparsification(Defense):
    """Drop a share of the coordinates of each row, those of smallest magnitude.

    Aji & Heafield, "Sparse Communication for Distributed Gradient Descent", EMNLP 2017, arXiv 1704.05021.
    Differs from VFLAIR-LLM: each row by itself, so that no position's coordinates starve another's, and no error
    feedback: the residual of one batch would be added to the examples of the next. Deterministic: whoever searches
    with the same rule finds every token (95 % dropped: all tokens recovered on tiny models).

    Attributes:
        rate: Share that is dropped, in [0, 1).
        gradients: Sparsify the gradient that is sent too.
    """

    rate: float = field(default=0.9, validator=[validators.ge(0), validators.lt(1)])
    gradients: bool = False

    covers = frozenset({"prompt", "response"})
    axes = frozenset({"BTD", "TBD", "BD"})

    def __attrs_post_init__(self) -> None:
        if self.gradients:
            self.covers = type(self).covers | {"gradients"}

    def on_smashed(self, smashed: Tensor, exchange: Exchange) -> Tensor:  # (..., D)
        return keep_largest(smashed, self.kept(smashed.shape[-1]))

    def on_gradient(self, gradient: Tensor, exchange: Exchange) -> Tensor:
        return keep_largest(gradient, self.kept(gradient.shape[-1])) if self.gradients else gradient

    def kept(self, width: int) -> int:
        """Coordinates of a row that remain: at least one."""
        return max(width - round(self.rate * width), 1)

    def bytes_per_row(self, width: int, value_bytes: int = 4) -> int:
        """What a sparse row would take on the wire: values and indices. Channels send rows dense today."""
        return sparse_bytes(self.kept(width), width, value_bytes)

    def mechanism(self) -> Mechanism:
        return SparseMechanism(self)

    def gradient_mechanism(self) -> Mechanism | None:
        return SparseMechanism(self) if self.gradients else None


@attrs.frozen
class SparseMechanism(Mechanism):
    """Sparsification is a known function: an attacker applies it to what she tries."""

    defense: Sparsification

    def expected(self, hidden: Tensor) -> Tensor:
        return keep_largest(hidden, self.defense.kept(hidden.shape[-1]))


def keep_largest(rows: Tensor, count: int) -> Tensor:  # (..., D)
    """Zero all but the `count` coordinates of largest magnitude of each row."""
    if count >= rows.shape[-1]:
        return rows
    chosen = rows.detach().abs().topk(count, dim=-1).indices
    return rows * torch.zeros_like(rows).scatter(-1, chosen, 1.0)


def sparse_bytes(kept: int, width: int, value_bytes: int) -> int:
    """Bytes of a row as values and indices, or dense where that is smaller."""
    index_bytes = 1 if width <= 2**8 else 2 if width <= 2**16 else 4
    return min(kept * (value_bytes + index_bytes), width * value_bytes)
