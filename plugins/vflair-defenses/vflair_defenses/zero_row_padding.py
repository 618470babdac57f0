"""Fill gradient rows that are exactly zero: they tell which positions enter the loss."""

from __future__ import annotations

import torch
from attrs import define, field, validators
from torch import Tensor

from vflair_core import Defense, Exchange
from vflair_defenses.rows import noise_like


@define(slots=False)
class ZeroRowPadding(Defense):
    """Replace each zero row of the sent gradient by Gaussian noise as long as a random row that is not zero.

    Prompt positions carry the label −100, so their gradient rows are exactly zero and tell the prompt from the
    answer (a control experiment of arXiv 2609.04382 finds real rows by the zeros of decoys in every frame). It
    hides the exact zeros, not the statistics: noise has no structure and gradients have. Padding positions stay
    zero, for the mask crosses in the clear anyway.

    Attributes:
        scale: Length of a filled row relative to the drawn one; 0 leaves zeros.
    """

    scale: float = field(default=1.0, validator=validators.ge(0))

    covers = frozenset({"gradients"})

    def on_gradient(self, gradient: Tensor, exchange: Exchange) -> Tensor:  # (B, T, D)
        if not self.scale or gradient.dim() < 3:
            return gradient
        norms = gradient.float().norm(dim=-1)  # (B, T)
        empty = norms == 0
        mask = exchange.mask
        if mask is not None:
            real = mask.bool().to(gradient.device)
            empty &= real.T if exchange.axes == "TBD" else real
        lengths = norms[norms > 0]
        if not len(lengths) or not empty.any():
            return gradient
        drawn = torch.randint(len(lengths), empty.shape, generator=exchange.generator)
        noise = noise_like(gradient, exchange)
        noise = (
            noise / noise.norm(dim=-1, keepdim=True) * lengths[drawn.to(lengths.device)][..., None]
        )
        return torch.where(empty[..., None], self.scale * noise.to(gradient.dtype), gradient)
