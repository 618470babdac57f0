"""Give all gradients of a batch the same expected norm, so that norms say nothing of labels."""

from __future__ import annotations

from attrs import define, field, validators
from torch import Tensor

from vflair_core import Defense
from vflair_core.defense import Exchange
from vflair_defenses.rows import examples_first, noise_like


@define(slots=False)
class NormMatching(Defense):
    """Scale each example's gradient by 1 + σᵢξ with σᵢ² = max‖g‖²/‖gᵢ‖² − 1: "max norm".

    Li et al., "Label Leakage and Protection in Two-party Split Learning", ICLR 2022, arXiv 2102.08504, §4.1: one
    ξ ~ N(0, 1) an example, so that E‖g̃ᵢ‖² = max‖g‖². Differs from the paper: `strength` multiplies σᵢ. It stops
    norm scoring only: the direction of a gradient, hence the cosine and spectral attacks, stays (up to sign).

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
