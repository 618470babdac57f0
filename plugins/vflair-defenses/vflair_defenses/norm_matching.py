"""Give all gradients of a batch the same expected norm, so that norms say nothing of labels."""

from __future__ import annotations

import math

import torch
from attrs import define, field, frozen, validators
from torch import Tensor

from vflair_core import Defense, Exchange, Mechanism
from vflair_defenses.rows import examples_first, noise_like


@define(slots=False)
class NormMatching(Defense):
    """Scale each example's gradient by 1 + σᵢξ with σᵢ² = max‖g‖²/‖gᵢ‖² − 1: "max norm".

    Li et al., "Label Leakage and Protection in Two-party Split Learning", ICLR 2022, arXiv 2102.08504, §4.1: one
    ξ ~ N(0, 1) an example, so that E‖g̃ᵢ‖² = max‖g‖². Differs from the paper: `strength` multiplies σᵢ. It stops
    norm scoring only: the direction of a gradient, hence the cosine and spectral attacks, stays (up to sign). Who knows it
    takes the likelihood of the factor.

    Attributes:
        strength: Factor of σᵢ: 1 is the paper's, 0 changes nothing.
    """

    strength: float = field(default=1.0, validator=validators.ge(0))

    covers = frozenset({"labels", "gradients"})
    axes = frozenset({"BTD", "TBD", "BD"})
    supports = frozenset({("*", "*", "*")})

    def on_gradient(self, gradient: Tensor, exchange: Exchange) -> Tensor:  # (B, ...)
        if not self.strength:
            return gradient
        rows = examples_first(gradient, exchange)
        norms = rows.flatten(1).norm(dim=1)  # (B,)
        # An example without any gradient has no direction to be scaled in; it stays zero.
        ratios = (norms.max() / norms.clamp_min(1e-30)).square() - 1
        spread = ratios.clamp_min(0).sqrt().where(norms > 0, 0.0)
        factors = 1 + self.strength * spread * noise_like(norms, exchange)
        shape = (
            [1, -1, *[1] * (gradient.dim() - 2)]
            if exchange.axes == "TBD"
            else [-1] + [1] * (gradient.dim() - 1)
        )
        return gradient * factors.view(shape).to(gradient.dtype)

    def gradient_mechanism(self) -> Mechanism | None:
        """A factor whose spread depends on the gradient's own norm; the largest of the batch is not known."""
        return RandomFactor(self.strength) if self.strength else None


@frozen
class RandomFactor(Mechanism):
    """What is sent is r times the gradient, r ~ N(1, s²(M²/‖g‖² − 1)), M the largest norm of the batch, s the strength.

    M lies anywhere between one and `widest` times the norm of the longest guess, evenly in its logarithm. What is sent may
    stand off the line of a guess by a tenth of its own length: the attacker's model drops nothing out.
    """

    strength: float
    widest: float = 30.0
    in_nats = True

    def log_likelihood(self, observed: Tensor, hidden: Tensor) -> Tensor:  # (..., T, D) -> (..., T)
        seen, guessed = observed.flatten(-2), hidden.flatten(-2)
        own = guessed.norm(dim=-1).clamp_min(1e-30)
        factor = (seen * guessed).sum(-1) / own.square()
        cosine = factor * own / seen.norm(dim=-1).clamp_min(1e-30)
        largest = own.max() * torch.logspace(0, math.log10(self.widest), 32, device=own.device)
        spread = self.strength * ((largest / own[..., None]).square() - 1).clamp_min(1e-6).sqrt()
        along = -0.5 * ((factor[..., None] - 1) / spread).square() - spread.log()
        along = along.logsumexp(-1) - own.log()  # a density of lengths, not of factors
        said = along - (1 - cosine.square()) / (2 * 0.1**2)
        rows = hidden.shape[-2]
        return (said / rows)[..., None].expand(*said.shape, rows)  # all rows have one factor
