"""Gaussian noise on the hidden states of a whole sequence: differential privacy for sequences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from attrs import define, field, validators
from torch import Tensor

from vflair_core import Defense, DefenseError, Exchange, Guarantee, Mechanism
from vflair_defenses.accounting import gaussian_epsilon, gaussian_sigma
from vflair_defenses.rows import clip_examples, drawing, is_off, noise_like, public_rows

if TYPE_CHECKING:
    from vflair_core import Party


@define(slots=False)
class DpForward(Defense):
    """Scale the hidden states of a sequence to ‖H‖_F ≤ C and add matrix Gaussian noise; one message is one release.

    Du et al., "DP-Forward: Fine-tuning and Inference on Language Models with Differential Privacy in Forward
    Pass", CCS 2023, arXiv 2309.06746, with equal variances (its aMGM at equal singular values) by the exact curve
    of Balle & Wang. Δ = 2C whatever the length, so long texts share one budget, and long texts drown. Differs from
    the paper: no projection to a smaller width; labels need label-randomised-response beside it; each decode step of
    a generation is a further release.

    Attributes:
        epsilon: ε of one message at `delta`; inf adds no noise.
        delta: δ of the whole run.
        clip: C, the largest Frobenius norm of a sequence; 0 takes it from public text; inf does not clip.
        quantile: Share of public sequences that are not clipped when `clip` is 0.
    """

    epsilon: float = field(default=8.0, validator=validators.gt(0))
    delta: float = field(default=1e-5, validator=[validators.gt(0), validators.lt(1)])
    clip: float = field(default=0.0, validator=validators.ge(0))
    quantile: float = field(default=0.5, validator=[validators.gt(0), validators.le(1)])
    _bound: float = field(init=False, default=0.0)

    covers = frozenset({"prompt", "response"})
    axes = frozenset({"BTD", "TBD", "BD"})

    def __attrs_post_init__(self) -> None:
        self._bound = self.clip

    @property
    def ratio(self) -> float:
        """σ / C."""
        return 0.0 if math.isinf(self.epsilon) else 2 * gaussian_sigma(self.epsilon, self.delta)

    def prepare(self, public_texts: Sequence[str], data_party: Party) -> None:
        """Take the clip from the norms of public sequences, if none was given."""
        if not self.clip:
            rows = public_rows(type(self).__name__, public_texts, data_party)
            norms = torch.stack([some.norm() for some in rows])
            self._bound = float(norms.float().quantile(self.quantile))

    def on_smashed(self, smashed: Tensor, exchange: Exchange) -> Tensor:  # (B, T, D)
        bound = self._ready()
        if is_off(bound, self.ratio):
            return smashed
        clipped = clip_examples(smashed, bound, exchange)
        if not self.ratio:
            return clipped.to(smashed.dtype)
        noise = noise_like(smashed, exchange)
        return (clipped + self.ratio * bound * noise).to(smashed.dtype)

    def mechanism(self) -> Mechanism:
        """The noise and, where the clip is known, its size; the factor of a sequence is fitted to each row."""
        bound = self._bound or math.inf
        return ScaledSequence(bound, self.ratio * bound if self.ratio else 0.0)

    def state(self) -> dict[str, Tensor]:
        return {"bound": torch.tensor(self._bound, dtype=torch.float64)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._bound = float(state["bound"])

    def guarantee(
        self, releases: int, messages: int = 0, gradients: int | None = None
    ) -> Guarantee:
        """One message is one release with Δ = 2C; without their number, each row counts as one."""
        bound, count = self._ready(), messages or releases
        if math.isinf(bound) or not self.ratio:
            return Guarantee()
        mu = 2 / self.ratio
        return Guarantee(
            mechanism="sequence-clipped Gaussian on smashed data",
            adjacency="replace the text of one example; each of its messages is one release",
            clip=bound,
            sensitivity=2 * bound,
            noise=self.ratio * bound,
            delta=self.delta,
            epsilon_per_release=gaussian_epsilon(mu, self.delta),
            releases=count,
            epsilon=gaussian_epsilon(mu * math.sqrt(count), self.delta),
            excluded=(
                "labels and gradients sent in training, what training on an example changes in later messages "
                "of others, lengths, timing and floating-point sampling"
            ),
            randomness="the data party's torch generator: from the operating system unless seeded",
        )

    def _ready(self) -> float:
        if not self._bound:
            raise DefenseError(
                "DpForward has no clip yet: call prepare(public_texts, data_party) first."
            )
        return self._bound


@define
class ScaledSequence(Mechanism):
    """What an adaptive attacker knows of `DpForward`: σ, and that a sequence was scaled by one unknown factor ≤ 1.

    The factor depends on all rows of the sequence, most of which she is still looking for; so each row is scored at the
    factor that fits it best, which can only flatter a wrong candidate. `sample` scales (B, T, D) by its own norm.
    """

    bound: float
    sigma: float

    @property
    def in_nats(self) -> bool:  # type: ignore[override]
        """Whether the size of the noise is known."""
        return math.isfinite(self.bound)

    def log_likelihood(self, observed: Tensor, hidden: Tensor) -> Tensor:
        square = hidden.square().sum(-1, keepdim=True).clamp_min(torch.finfo(hidden.dtype).tiny)
        factor = ((observed * hidden).sum(-1, keepdim=True) / square).clamp(0, 1)
        gap = (observed - factor * hidden).square().sum(-1)
        if not self.in_nats:
            return -gap
        return -gap / (2 * max(self.sigma, 1e-6 * self.bound) ** 2)

    def sample(
        self, hidden: Tensor, generator: torch.Generator
    ) -> Tensor:  # (B, T, D) -> (B, T, D)
        if not self.in_nats:
            return hidden
        exchange = drawing(generator)
        clipped = clip_examples(hidden, self.bound, exchange)
        return clipped + self.sigma * noise_like(hidden, exchange) if self.sigma else clipped
