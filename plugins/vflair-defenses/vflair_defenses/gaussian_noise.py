"""Clipped Gaussian noise on smashed data and gradients, with the guarantee it really gives."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import attrs
import torch
from attrs import define, field, validators
from torch import Tensor

from vflair_core import Defense, DefenseError, Exchange, Guarantee, Mechanism
from vflair_defenses.accounting import gaussian_epsilon, gaussian_sigma
from vflair_defenses.rows import (
    clip_examples,
    clip_guesses,
    clip_rows,
    is_off,
    noise_like,
    public_rows,
)

if TYPE_CHECKING:
    from vflair_core import Party


@define(slots=False)
class GaussianNoise(Defense):
    """Clip each row of every smashed tensor to L2 norm C and add N(0, σ²) to each coordinate, fresh each time.

    The Gaussian mechanism of Dwork & Roth (2014) with the exact curve of Balle & Wang (arXiv 1805.06530).
    Differs from VFLAIR-LLM: rows are clipped, so there is a sensitivity and hence a guarantee; every exchange
    is defended, decode steps included; releases are counted and composed.

    Attributes:
        noise_multiplier: σ / C. For rows of width D, 1/√D is as much noise as signal.
        epsilon: Instead of `noise_multiplier`: the ε of one release at `delta`; 0 to use the multiplier.
        delta: δ of the whole run.
        clip: C, the largest L2 norm of a row; 0 takes it from public text; inf does not clip.
        quantile: Share of public rows that are not clipped when `clip` is 0.
        gradient_multiplier: σ / C of the gradient that is sent; 0 leaves it as it is.
        gradient_clip: C of the gradient of one example (all its rows together); needed with its multiplier.
    """

    noise_multiplier: float = field(
        default=0.1, validator=[validators.ge(0), validators.lt(math.inf)]
    )
    epsilon: float = field(default=0.0, validator=validators.ge(0))
    delta: float = field(default=1e-5, validator=[validators.gt(0), validators.lt(1)])
    clip: float = field(default=0.0, validator=validators.ge(0))
    quantile: float = field(default=0.95, validator=[validators.gt(0), validators.le(1)])
    gradient_multiplier: float = field(default=0.0, validator=validators.ge(0))
    gradient_clip: float = field(default=0.0, validator=validators.ge(0))
    _bound: float = field(init=False, default=0.0)

    covers = frozenset({"prompt", "response"})
    axes = frozenset({"BTD", "TBD", "BD"})

    def __attrs_post_init__(self) -> None:
        self._bound = self.clip
        if self.gradient_multiplier:
            self.covers = gradient_cover(self, self.gradient_clip)

    @property
    def ratio(self) -> float:
        """σ / C."""
        if self.epsilon:
            return 2 * gaussian_sigma(self.epsilon, self.delta)  # Δ = 2C
        return self.noise_multiplier

    def prepare(self, public_texts: Sequence[str], data_party: Party) -> None:
        """Take the clip from the row norms of public text, if none was given."""
        if not self.clip:
            rows = public_rows(type(self).__name__, public_texts, data_party)
            norms = torch.cat([some.norm(dim=-1).flatten() for some in rows])
            self._bound = float(norms.float().quantile(self.quantile))

    def on_smashed(self, smashed: Tensor, exchange: Exchange) -> Tensor:  # (..., D)
        bound = self._ready()
        if is_off(bound, self.ratio):
            return smashed
        clipped = clip_rows(smashed, bound)
        if not self.ratio:
            return clipped.to(smashed.dtype)
        noise = noise_like(smashed, exchange)
        return (clipped + self.ratio * bound * noise).to(smashed.dtype)

    def on_gradient(self, gradient: Tensor, exchange: Exchange) -> Tensor:  # (B, ...)
        if not self.gradient_multiplier:
            return gradient
        clipped = clip_examples(gradient, self.gradient_clip, exchange)
        noise = self.gradient_multiplier * self.gradient_clip * noise_like(gradient, exchange)
        return (clipped + noise).to(gradient.dtype)

    def mechanism(self) -> Mechanism | None:
        """Clip and noise scale, when they are known; else that there is Gaussian noise, which is the default."""
        if not self._bound or math.isinf(self._bound):
            return None
        return GaussianMechanism(self._bound, self.ratio * self._bound)

    def gradient_mechanism(self) -> Mechanism | None:
        """Clip of an example and noise scale."""
        if not self.gradient_multiplier:
            return None
        return GaussianGradient(self.gradient_clip, self.gradient_multiplier * self.gradient_clip)

    def state(self) -> dict[str, Tensor]:
        return {"bound": torch.tensor(self._bound, dtype=torch.float64)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._bound = float(state["bound"])

    def guarantee(
        self, releases: int, messages: int = 0, gradients: int | None = None
    ) -> Guarantee:
        """One row is one release with Δ₂ = 2C and so is one gradient of an example; all of them compose."""
        bound = self._ready()
        if math.isinf(bound) or not self.ratio:
            return Guarantee()
        mu = 2 / self.ratio
        squares = releases * mu**2
        outside = "what training on an example changes in later rows of others, lengths, timing and floating-point sampling"
        if self.gradient_multiplier:
            gradients = releases if gradients is None else gradients
            squares += gradients * (2 / self.gradient_multiplier) ** 2
            releases += gradients
        else:
            outside = f"gradients sent in training, {outside}"
        return Guarantee(
            mechanism="row-clipped Gaussian on smashed data"
            + (" and clipped Gaussian on gradients" if self.gradient_multiplier else ""),
            adjacency="replace the text of one example; each of its rows is one release",
            clip=bound,
            sensitivity=2 * bound,
            noise=self.ratio * bound,
            delta=self.delta,
            epsilon_per_release=gaussian_epsilon(mu, self.delta),
            releases=releases,
            epsilon=gaussian_epsilon(math.sqrt(squares), self.delta),
            excluded=outside,
            randomness="the data party's torch generator: from the operating system unless seeded",
        )

    def _ready(self) -> float:
        if not self._bound:
            raise DefenseError(
                "GaussianNoise has no clip yet: call prepare(public_texts, data_party) first."
            )
        return self._bound


@attrs.frozen
class GaussianMechanism(Mechanism):
    """What an adaptive attacker knows of `GaussianNoise`: clip and noise scale, not the noise."""

    bound: float
    sigma: float
    in_nats = True

    def expected(self, hidden: Tensor) -> Tensor:
        return clip_rows(hidden, self.bound)

    def log_likelihood(self, observed: Tensor, hidden: Tensor) -> Tensor:
        residual = (observed - self.expected(hidden)).square().sum(-1)
        smallest = 1e-6 * self.bound  # clipping alone still leaves rounding
        return -residual / (2 * max(self.sigma, smallest) ** 2)

    def sample(self, hidden: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(hidden.shape, generator=generator).to(hidden.device)
        return self.expected(hidden) + self.sigma * noise


@attrs.frozen
class GaussianGradient(Mechanism):
    """What an adaptive attacker knows of the gradient: the clip of an example and the noise scale."""

    bound: float
    sigma: float
    in_nats = True

    def expected(self, hidden: Tensor) -> Tensor:  # (..., T, D)
        return clip_guesses(hidden, self.bound)

    def log_likelihood(self, observed: Tensor, hidden: Tensor) -> Tensor:
        return -(observed - self.expected(hidden)).square().sum(-1) / (2 * self.sigma**2)

    def sample(self, hidden: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(hidden.shape, generator=generator).to(hidden.device)
        return self.expected(hidden) + self.sigma * noise


def gradient_cover(defense: Defense, clip: float) -> frozenset[str]:
    """What is covered once gradients are noised too: they carry the labels.

    Raises:
        DefenseError: There is no clip, hence no sensitivity.
    """
    if not 0 < clip < math.inf:
        raise DefenseError(
            f"{type(defense).__name__} cannot noise gradients without a sensitivity: gradient_clip is {clip}. "
            "Set it to a norm that public text rarely exceeds."
        )
    return type(defense).covers | {"gradients", "labels"}
