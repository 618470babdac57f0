"""L1-clipped Laplace noise on smashed data and gradients: pure ε, which grows fast with width."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import attrs
import torch
from attrs import define, field, validators
from torch import Tensor

from vflair_core import Defense, DefenseError, Exchange, Guarantee, Mechanism
from vflair_defenses.gaussian_noise import gradient_cover
from vflair_defenses.rows import (
    clip_examples,
    clip_guesses,
    clip_rows,
    drawing,
    is_off,
    laplace_like,
    public_rows,
)

if TYPE_CHECKING:
    from vflair_core import Party


@define(slots=False)
class LaplaceNoise(Defense):
    """Clip each row of every smashed tensor to L1 norm C₁ and add Laplace(2C₁/ε) to each coordinate.

    Dwork, McSherry, Nissim, Smith, "Calibrating Noise to Sensitivity in Private Data Analysis", TCC 2006.
    Differs from VFLAIR-LLM ("DP"): its Δ is a number per model type and nothing is clipped, so its ε says
    nothing; here ε is what one row really gives. The L1 norm of the noise is about 2D·C₁/ε, so at ε = 2D there is as
    much noise as signal: on SmolLM2 (D = 576) useful ε are above 10,000, the honest price of pure DP in D dimensions.

    Attributes:
        epsilon: ε of one row; inf adds no noise.
        clip: C₁, the largest L1 norm of a row; 0 takes it from public text; inf does not clip.
        quantile: Share of public rows that are not clipped when `clip` is 0.
        gradient_epsilon: ε of the gradient of one example; 0 leaves gradients as they are.
        gradient_clip: Largest L1 norm of the gradient of one example, all its rows together.
    """

    epsilon: float = field(default=50.0, validator=validators.gt(0))
    clip: float = field(default=0.0, validator=validators.ge(0))
    quantile: float = field(default=0.95, validator=[validators.gt(0), validators.le(1)])
    gradient_epsilon: float = field(default=0.0, validator=validators.ge(0))
    gradient_clip: float = field(default=0.0, validator=validators.ge(0))
    _bound: float = field(init=False, default=0.0)

    covers = frozenset({"prompt", "response"})
    axes = frozenset({"BTD", "TBD", "BD"})

    def __attrs_post_init__(self) -> None:
        self._bound = self.clip
        if self.gradient_epsilon:
            self.covers = gradient_cover(self, self.gradient_clip)

    def prepare(self, public_texts: Sequence[str], data_party: Party) -> None:
        """Take the clip from the L1 norms of public rows, if none was given."""
        if not self.clip:
            rows = public_rows(type(self).__name__, public_texts, data_party)
            norms = torch.cat([some.norm(p=1, dim=-1).flatten() for some in rows])
            self._bound = float(norms.float().quantile(self.quantile))

    def on_smashed(self, smashed: Tensor, exchange: Exchange) -> Tensor:  # (..., D)
        bound = self._ready()
        if is_off(bound, 1 / self.epsilon):
            return smashed
        clipped = clip_rows(smashed, bound, order=1)
        if math.isinf(self.epsilon):
            return clipped.to(smashed.dtype)
        noise = 2 * bound / self.epsilon * laplace_like(smashed, exchange)
        return (clipped + noise).to(smashed.dtype)

    def on_gradient(self, gradient: Tensor, exchange: Exchange) -> Tensor:  # (B, ...)
        if not self.gradient_epsilon:
            return gradient
        clipped = clip_examples(gradient, self.gradient_clip, exchange, order=1)
        scale = 2 * self.gradient_clip / self.gradient_epsilon
        return (clipped + scale * laplace_like(gradient, exchange)).to(gradient.dtype)

    def mechanism(self) -> Mechanism | None:
        if not self._bound or math.isinf(self._bound):
            return None
        return LaplaceMechanism(self._bound, 2 * self._bound / self.epsilon)

    def gradient_mechanism(self) -> Mechanism | None:
        """Clip of an example and noise scale."""
        if not self.gradient_epsilon:
            return None
        return LaplaceGradient(self.gradient_clip, 2 * self.gradient_clip / self.gradient_epsilon)

    def state(self) -> dict[str, Tensor]:
        return {"bound": torch.tensor(self._bound, dtype=torch.float64)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._bound = float(state["bound"])

    def guarantee(
        self, releases: int, messages: int = 0, gradients: int | None = None
    ) -> Guarantee:
        """Pure ε of rows and gradients add up: basic composition, which is exact for worst-case Laplace."""
        bound = self._ready()
        if math.isinf(bound) or math.isinf(self.epsilon):
            return Guarantee()
        outside = "what training on an example changes in later rows of others, lengths, timing and floating-point sampling"
        gradients = releases if gradients is None else gradients
        if not self.gradient_epsilon:
            gradients, outside = 0, f"gradients sent in training, {outside}"
        return Guarantee(
            mechanism="row-clipped Laplace on smashed data"
            + (" and clipped Laplace on gradients" if self.gradient_epsilon else ""),
            adjacency="replace the text of one example; each of its rows is one release",
            clip=bound,
            sensitivity=2 * bound,
            noise=math.sqrt(2) * 2 * bound / self.epsilon,
            delta=0.0,
            epsilon_per_release=self.epsilon,
            releases=releases + gradients,
            epsilon=releases * self.epsilon + gradients * self.gradient_epsilon,
            excluded=outside,
            randomness="the data party's torch generator: from the operating system unless seeded",
        )

    def _ready(self) -> float:
        if not self._bound:
            raise DefenseError(
                "LaplaceNoise has no clip yet: call prepare(public_texts, data_party) first."
            )
        return self._bound


@attrs.frozen
class LaplaceMechanism(Mechanism):
    """What an adaptive attacker knows: clip and scale, hence that likely means near in L1."""

    bound: float
    scale: float
    in_nats = True

    def expected(self, hidden: Tensor) -> Tensor:
        return clip_rows(hidden, self.bound, order=1)

    def sample(self, hidden: Tensor, generator: torch.Generator) -> Tensor:
        return self.expected(hidden) + self.scale * laplace_like(hidden, drawing(generator))

    def log_likelihood(self, observed: Tensor, hidden: Tensor) -> Tensor:
        residual = (observed - self.expected(hidden)).abs().sum(-1)
        return -residual / max(self.scale, 1e-6 * self.bound)


@attrs.frozen
class LaplaceGradient(Mechanism):
    """What an adaptive attacker knows of the gradient: the clip of an example and the noise scale."""

    bound: float
    scale: float
    in_nats = True

    def expected(self, hidden: Tensor) -> Tensor:  # (..., T, D)
        return clip_guesses(hidden, self.bound, order=1)

    def sample(self, hidden: Tensor, generator: torch.Generator) -> Tensor:
        return self.expected(hidden) + self.scale * laplace_like(hidden, drawing(generator))

    def log_likelihood(self, observed: Tensor, hidden: Tensor) -> Tensor:
        return -(observed - self.expected(hidden)).abs().sum(-1) / self.scale
