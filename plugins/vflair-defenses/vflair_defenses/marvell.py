"""Noise on the gradients of a binary classifier that makes both classes look alike, as cheaply as possible."""

from __future__ import annotations

from collections.abc import Mapping

import attrs
import torch
from attrs import define, field, frozen, validators
from torch import Tensor

from vflair_core import Defense, DefenseError, Exchange
from vflair_defenses.rows import examples_first, noise_like


@define(slots=False)
class Marvell(Defense):
    """Add Gaussian noise of a shape of its own to each class, so that the two are hardest to tell apart.

    Li et al., "Label Leakage and Protection in Two-party Split Learning", ICLR 2022, arXiv 2102.08504, §4.2 and
    Theorem 2. For each class: variance λ₁ along the difference of the class means and λ₂ in all other directions,
    which minimise the symmetric KL divergence under a power of `power` times the squared distance of the means.
    Any detector of one message then has a balanced error of at least ½ − √sumKL / 4, under the paper's assumption
    that the gradients of a class are Gaussian; that assumption makes it no guarantee. One message only, binary
    labels only. The four variances are found by gradient descent on shares of the power, not in closed form. Differs
    from the paper: a batch of one class, which shows no difference, gets the noise of the last batch of two.

    Attributes:
        power: Noise power in units of ‖Δg‖²; 0 adds none.
    """

    power: float = field(default=4.0, validator=validators.ge(0))
    _shape: _Shape | None = field(init=False, default=None, eq=False)  # of the last batch of two

    covers = frozenset({"labels", "gradients"})
    supports = frozenset({("*", "classification", phase) for phase in ("train", "eval")})

    def on_gradient(self, gradient: Tensor, exchange: Exchange) -> Tensor:  # (B, ...)
        if not self.power:
            return gradient
        positive = _positive(exchange)
        rows = examples_first(gradient, exchange)
        exact = rows.detach().float()
        if positive.any() and not positive.all():
            self._shape = _Shape.of(exact[~positive], exact[positive], self.power)
        if self._shape is None:
            raise DefenseError(
                "Marvell learns from a batch of both classes how they differ, and there was none yet. Make the batch larger, "
                "or begin with one that has both."
            )
        noise = self._shape.scaled(noise_like(exact, exchange), positive.long()).view(rows.shape)
        noise = noise.transpose(0, 1) if exchange.axes == "TBD" else noise
        return gradient + noise.to(gradient.dtype)

    def private_state(self) -> dict[str, Tensor]:
        return {} if self._shape is None else attrs.asdict(self._shape)

    def load_private_state(self, state: Mapping[str, Tensor]) -> None:
        self._shape = _Shape(**state) if state else None


@frozen(eq=False)
class _Shape:
    """The shape of the noise: `difference` of the class means, (T, D) or (D,), and the variances of each class, (2,)."""

    difference: Tensor
    along: Tensor
    across: Tensor

    @classmethod
    def of(cls, negative: Tensor, positive: Tensor, power: float) -> _Shape:
        """Find it from the gradients of the two classes, (B₀, ...) and (B₁, ...)."""
        difference = positive.mean(0) - negative.mean(0)
        distance = float(difference.square().sum())
        spread = [_variance(negative), _variance(positive)]
        share = len(positive) / (len(positive) + len(negative))
        return cls(
            difference,
            *best_variances(distance, spread, difference.numel(), share, power * distance),
        )

    def scaled(self, draw: Tensor, own: Tensor) -> Tensor:  # (B, ...), (B,) -> (B, W)
        """Give standard normal draws the variances of each example's class; a batch may have other lengths."""
        difference = self.difference.to(draw.device)
        if difference.dim() > 1:  # positions at the end are cut off, or have no difference
            missing = draw.shape[1] - len(difference)
            difference = torch.nn.functional.pad(difference, (0, 0, 0, missing))
        flat = difference.flatten()
        direction = flat / flat.norm().clamp_min(1e-30)
        rows = draw.flatten(1)
        component = (rows @ direction)[:, None] * direction
        along, across = (
            v.to(rows)[own.to(rows.device), None].sqrt() for v in (self.along, self.across)
        )
        return across * (rows - component) + along * component


def sum_kl(
    along: Tensor, across: Tensor, distance: float, spread: list[float], width: int
) -> Tensor:
    """KL(P₁‖P₀) + KL(P₀‖P₁) of two Gaussians with means √distance apart and these variances (2,)."""
    first, second = along + torch.tensor(spread), across + torch.tensor(spread)
    parallel = (first[0] + distance) / first[1] + (first[1] + distance) / first[0]
    others = second[0] / second[1] + second[1] / second[0]
    return 0.5 * (parallel + (width - 1) * others) - width


def best_variances(
    distance: float, spread: list[float], width: int, share: float, power: float
) -> tuple[Tensor, Tensor]:
    """Return λ₁ and λ₂ of both classes, (2,) each: least `sum_kl` at the given mean noise power.

    Args:
        distance: Squared distance of the class means.
        spread: Variance per coordinate that the gradients of each class have already.
        width: Number of coordinates.
        share: Share of the class numbered 1.
        power: Mean squared norm of the noise.
    """
    if distance == 0:  # nothing to hide
        return torch.zeros(2), torch.zeros(2)
    unit = distance  # everything relative to it, so that one step size fits
    weights = torch.tensor([1 - share, share])
    floor = [max(s / unit, 1e-6) for s in spread]
    shares = torch.tensor([0.0, 0.0, -4.0, -4.0], requires_grad=True)
    with torch.enable_grad():
        optimizer = torch.optim.Adam([shares], lr=0.1)
        for _ in range(200):
            along, across = _variances(shares, weights, width, power / unit)
            optimizer.zero_grad()
            sum_kl(along, across, 1.0, floor, width).log1p().backward()
            optimizer.step()
    along, across = _variances(shares.detach(), weights, width, power / unit)
    return along * unit, across * unit


def _variances(shares: Tensor, weights: Tensor, width: int, power: float) -> tuple[Tensor, Tensor]:
    """Part the power into four: along and across, for each class."""
    parts = shares.softmax(0) * power
    return parts[:2] / weights, parts[2:] / weights / max(width - 1, 1)


def _variance(rows: Tensor) -> float:
    """Per coordinate, of gradients (B, ...); one example shows none."""
    return float((rows - rows.mean(0)).square().mean())


def _positive(exchange: Exchange) -> Tensor:
    labels = exchange.batch.get("labels")
    if labels is None or labels.dim() != 1 or labels.is_floating_point() or int(labels.max()) > 1:
        raise DefenseError(
            "Marvell tells two classes apart: it needs labels of shape (B,) that are 0 or 1. Use norm-matching "
            "for more classes."
        )
    return labels.bool().cpu()
