"""A variational bottleneck at the cut: what crosses is a noisy code whose information is bounded and charged for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import attrs
import torch
from attrs import define, field, validators
from torch import Tensor, nn
from torch.nn.functional import softplus

from vflair_core import Defense, DefenseError, Exchange, Mechanism
from vflair_defenses.learning import parameters_of, read_state, seeded, state_of
from vflair_defenses.rows import (
    drawing,
    gradients_of,
    noise_like,
    public_returned,
    public_rows,
    real_rows,
    width_of,
)

if TYPE_CHECKING:
    from vflair_core import Party


class Bottleneck(nn.Module):
    """h → N(μ(h), σ(h)²) → decoder. Linear, or residual: both start as the identity, and the code is as wide as h.

    No ReLU anywhere (a code that cannot be negative is far from the prior by construction) and no floor of σ.
    """

    def __init__(self, width: int, code: int, decoder: str, start: float) -> None:
        super().__init__()
        self.mean, self.spread = nn.Linear(width, code), nn.Linear(width, code)
        self.decode = nn.Linear(code, width)
        self.residual = decoder == "residual"
        nn.init.zeros_(self.spread.weight)
        nn.init.constant_(self.spread.bias, math.log(math.expm1(start)))
        if self.residual:
            for layer in (self.mean, self.decode):
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)

    def code(self, hidden: Tensor) -> tuple[Tensor, Tensor]:  # (..., D) -> two of (..., K)
        """Return μ and σ."""
        mean = self.mean(hidden)
        return hidden + mean if self.residual else mean, softplus(self.spread(hidden))

    def decoded(self, code: Tensor) -> Tensor:  # (..., K) -> (..., D)
        """Return what the code becomes again."""
        return code + self.decode(code) if self.residual else self.decode(code)

    def encoded(self, observed: Tensor) -> Tensor:  # (..., D) -> (..., K)
        """Undo the decoder, which is affine: by least squares."""
        matrix = self.decode.weight  # (D, K)
        if self.residual:
            matrix = matrix + torch.eye(len(matrix), device=matrix.device)
        return (observed - self.decode.bias) @ torch.linalg.pinv(matrix).T


def divergence(mean: Tensor, sigma: Tensor) -> Tensor:  # two of (..., K) -> (...)
    """KL(N(μ, σ²) ‖ N(0, 1)) in nats, summed over the code: ½ Σ (μ² + σ² − 1 − ln σ²)."""
    return 0.5 * (mean.square() + sigma.square() - 1 - 2 * sigma.log()).sum(-1)


@define(slots=False)
class Mid(Defense):
    """Send z = μ(h) + σ(h)·ξ through a linear decoder, and pay λ times its KL divergence from N(0, 1) in training.

    Alemi et al., "Deep Variational Information Bottleneck", ICLR 2017, arXiv 1612.00410; as a defense of vertical
    learning: Zou et al., "Mutual Information Regularization for Vertical Federated Learning" (MID), arXiv
    2301.01142. Differs from VFLAIR-LLM, whose decoders end in a ReLU and whose KL is summed over positions: ξ is
    fresh for every message, evaluation and generation included; the KL is summed over the code and averaged over
    tokens that are no padding. That mean bounds, averaged over positions, what all rows of a text together tell of it
    (`measured_divergence`, `token_error_bound`). It is an average, no differential privacy: the guarantee is
    empirical.

    Attributes:
        weight: λ, loss per nat and token.
        place: head (what is sent), tail (what came back, HBT only: protects labels), or both.
        code: Width of the code; 0 is as wide as the hidden states. Residual needs 0.
        decoder: linear, or residual: starts as the identity.
        start: σ before training.
        noise: Factor of σ; 0 is the control without noise, which no bound holds for and nothing is paid for.
        seed: Seed of the first weights.
    """

    weight: float = field(default=1e-3, validator=validators.ge(0))
    place: Literal["head", "tail", "both"] = field(
        default="head", validator=validators.in_(("head", "tail", "both"))
    )
    code: int = field(default=0, validator=validators.ge(0))
    decoder: Literal["linear", "residual"] = field(
        default="residual", validator=validators.in_(("linear", "residual"))
    )
    start: float = field(default=0.1, validator=validators.gt(0))
    noise: float = field(default=1.0, validator=validators.ge(0))
    seed: int = 0
    _parts: nn.ModuleDict = field(init=False, factory=nn.ModuleDict, eq=False)

    axes = frozenset({"BTD", "TBD", "BD"})

    def __attrs_post_init__(self) -> None:
        if self.decoder == "residual" and self.code:
            raise DefenseError(
                f"A residual code is as wide as the hidden states, not {self.code}: set code = 0, or "
                'decoder = "linear".'
            )
        covered = {"head": {"prompt", "response"}, "tail": {"labels"}}
        self.covers = frozenset().union(*(covered[where] for where in self._places))
        if self.place != "head":
            self.supports = frozenset({("HBT", "*", "*")})

    @property
    def _places(self) -> tuple[str, ...]:
        return ("head", "tail") if self.place == "both" else (self.place,)

    def prepare(self, public_texts: Sequence[str], data_party: Party) -> None:
        """Build the bottlenecks for the model's width; they are trained with the model."""
        width = width_of(data_party)
        with seeded(self.seed):
            made = {
                where: Bottleneck(width, self.code or width, self.decoder, self.start)
                for where in self._places
            }
        self._parts = nn.ModuleDict(made).to(data_party.model.device)

    def on_smashed(self, smashed: Tensor, exchange: Exchange) -> Tensor:  # (..., D)
        return self._through("head", smashed, exchange)

    def on_returned(self, returned: Tensor, exchange: Exchange) -> Tensor:  # (..., D)
        return self._through("tail", returned, exchange)

    def _through(self, where: str, hidden: Tensor, exchange: Exchange) -> Tensor:
        if where not in self._places:
            return hidden
        part = self.part(where)
        mean, sigma = part.code(hidden.float())
        if self.noise:
            sigma = self.noise * sigma
            mean_and_noise = mean + sigma * noise_like(mean, exchange)
            if exchange.phase == "train":
                cost = real_rows(divergence(mean, sigma)[..., None], exchange)
                exchange.memo.setdefault(f"nats {id(self)}", []).append(cost.mean())
            mean = mean_and_noise
        return part.decoded(mean).to(hidden.dtype)

    def penalty(self, exchange: Exchange) -> Tensor | None:
        """λ times the KL per token of this exchange, in nats."""
        paid: list[Tensor] = exchange.memo.get(f"nats {id(self)}", [])
        return self.weight * torch.stack(paid).sum() if paid else None

    def part(self, where: str) -> Bottleneck:
        """The bottleneck at head or tail."""
        if where not in self._parts:
            raise DefenseError(
                "Mid has no bottleneck yet: call prepare(public_texts, data_party) first."
            )
        found = self._parts[where]
        assert isinstance(found, Bottleneck)
        return found

    def parameters(self) -> Sequence[nn.Parameter]:
        return parameters_of(self._parts)

    def mechanism(self) -> Mechanism | None:
        """The bottleneck of the head once it is known; else only that there is noise."""
        if self.place == "tail":
            return None
        return MidMechanism(self.part("head"), self.noise) if len(self._parts) else Mechanism()

    def findings(self, public_texts: Sequence[str], data_party: Party) -> Mapping[str, float]:
        """Nats per token of public text, and the half-width of their 95 % interval over texts, at head and tail.

        At the tail public text crosses once more. Models of two stacks are asked for more than text there: nothing is
        said of it.
        """
        two_stacks = bool(data_party.model.config.is_encoder_decoder)
        found: dict[str, float] = {}
        for where in self._places if self.noise and public_texts and data_party.tokenizer else ():
            if where == "tail" and two_stacks:
                continue
            end = "" if where == "head" else " at the tail"
            nats, half_width = measured_divergence(self, data_party, public_texts, where)
            found |= {f"nats per token{end}": nats, f"half-width{end}": half_width}
        return found

    def state(self) -> dict[str, Tensor]:
        return state_of(self._parts)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        if not len(self._parts):
            code, width = next(v for k, v in state.items() if k.endswith("mean.weight")).shape
            self._parts = nn.ModuleDict(
                {w: Bottleneck(width, code, self.decoder, self.start) for w in self._places}
            )
        read_state(self._parts, state)


@attrs.frozen(eq=False)
class MidMechanism(Mechanism):
    """The attacker undoes the affine decoder and is left with a Gaussian whose μ and σ she can compute."""

    part: Bottleneck
    noise: float
    in_nats = True

    def _at(self, hidden: Tensor) -> Bottleneck:
        """The bottleneck, moved to where an attacker's head gave the hidden states."""
        return self.part.to(hidden.device)

    def expected(self, hidden: Tensor) -> Tensor:
        part = self._at(hidden)
        with gradients_of(hidden):
            return part.decoded(part.code(hidden.float())[0])

    def sample(self, hidden: Tensor, generator: torch.Generator) -> Tensor:
        part = self._at(hidden)
        with gradients_of(hidden):
            mean, sigma = part.code(hidden.float())
            drawn = noise_like(mean, drawing(generator))
            return part.decoded(mean + self.noise * sigma * drawn)

    def log_likelihood(self, observed: Tensor, hidden: Tensor) -> Tensor:
        part = self._at(hidden)
        with gradients_of(hidden):
            mean, sigma = part.code(hidden.float())
            sigma = (self.noise * sigma).clamp_min(1e-6)
            gap = (part.encoded(observed.float()) - mean) / sigma
            return -0.5 * gap.square().sum(-1) - sigma.log().sum(-1)


def measured_divergence(
    defense: Mid, data_party: Party, texts: Sequence[str], place: str = "head"
) -> tuple[float, float]:
    """Return the KL in nats per token on held-out text, and the half-width of its 95 % interval over texts.

    Of one text the half-width is not known: infinite.
    """
    part, each = defense.part(place), []
    if place == "head":
        there = public_rows("measured_divergence", texts, data_party)
    else:
        there = (r for _, r in public_returned("measured_divergence", texts, data_party))
    for rows in there:
        with torch.no_grad():
            mean, sigma = part.code(rows.float())
            each.append(divergence(mean, defense.noise * sigma).mean())
    found = torch.stack(each)
    spread = float(found.std()) if len(found) > 1 else math.inf
    return float(found.mean()), 1.96 * spread / math.sqrt(len(found))


def token_error_bound(entropy: float, nats: float, vocabulary: int) -> float:
    """Least mean share of tokens that any attacker gets wrong: max(0, (h − k − ln 2) / ln(V − 1)), by Fano.

    Args:
        entropy: h, a lower estimate of the entropy of the text in nats per token. The cross-entropy of a language
            model is an upper one: with it the bound is indicative only.
        nats: k, KL per token times the number of releases of each token.
        vocabulary: V, at least 2; of two tokens the bound is the error whose binary entropy is h − k.

    Raises:
        ValueError: There are fewer than two tokens to err among.
    """
    if vocabulary < 2:
        raise ValueError(
            f"vocabulary is {vocabulary}: an attacker can err among two tokens or more."
        )
    if vocabulary == 2:
        return _error_of(entropy - nats)
    return max(0.0, (entropy - nats - math.log(2)) / math.log(vocabulary - 1))


def _error_of(entropy: float) -> float:
    """The error e ≤ ½ of which the binary entropy is `entropy` nats."""
    low, high = 0.0, 0.5
    for _ in range(60):
        middle = (low + high) / 2
        binary = -middle * math.log(middle) - (1 - middle) * math.log1p(-middle)
        low, high = (middle, high) if binary < entropy else (low, middle)
    return low
