"""Few bits for each coordinate: cheap to send, and no protection by itself."""

from __future__ import annotations

import attrs
from attrs import define, field, validators
from torch import Tensor

from vflair_core import Defense, Exchange, Mechanism


@define(slots=False)
class Quantisation(Defense):
    """Round each row to 2^b − 1 evenly spaced levels between ± its largest magnitude.

    Symmetric row-wise rounding as in Dettmers et al., "LLM.int8()", NeurIPS 2022, arXiv 2208.07339; the gradient
    passes straight through (Bengio et al., arXiv 1308.3432). A control: 4 bits still give all tokens away.

    Attributes:
        bits: Bits of a coordinate, 2 to 16; 0 does not round.
        gradients: Round the gradient that is sent too.
    """

    bits: int = field(default=8, validator=[validators.ge(0), validators.le(16)])
    gradients: bool = False

    covers = frozenset({"prompt", "response"})
    axes = frozenset({"BTD", "TBD", "BD"})

    def __attrs_post_init__(self) -> None:
        if self.bits == 1:
            raise ValueError("bits is 1, which leaves one level. Possible: 2 to 16, or 0 for none.")
        if self.gradients:
            self.covers = type(self).covers | {"gradients"}

    def on_smashed(self, smashed: Tensor, exchange: Exchange) -> Tensor:  # (..., D)
        return rounded(smashed, self.bits)

    def on_gradient(self, gradient: Tensor, exchange: Exchange) -> Tensor:
        return rounded(gradient, self.bits) if self.gradients else gradient

    def bytes_per_row(self, width: int, scale_bytes: int = 4) -> int:
        """What a packed row would take on the wire: levels and one scale. Channels send rows dense today."""
        return -(-width * (self.bits or 32) // 8) + scale_bytes

    def mechanism(self) -> Mechanism:
        return RoundingMechanism(self.bits)

    def gradient_mechanism(self) -> Mechanism | None:
        return RoundingMechanism(self.bits) if self.gradients else None


@attrs.frozen
class RoundingMechanism(Mechanism):
    """Rounding is a known function: an attacker applies it to what she tries."""

    bits: int

    def expected(self, hidden: Tensor) -> Tensor:
        return rounded(hidden, self.bits)


def rounded(rows: Tensor, bits: int) -> Tensor:  # (..., D)
    """Round each row to the nearest of its levels; the gradient passes as if nothing had happened."""
    if not bits:
        return rows
    exact = rows.detach().float()
    step = exact.abs().amax(-1, keepdim=True).clamp_min(1e-30) / (2 ** (bits - 1) - 1)
    error = ((exact / step).round() * step - exact).to(rows.dtype)
    return rows + error
