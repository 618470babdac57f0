"""What attacks by optimisation share: what the defense does on purpose, budgets, descent, and decoding."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from attrs import define, field, frozen
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from vflair_core import AttackError

Progress = Callable[..., None]
Loss = Literal["mse", "cosine"]
Metric = Literal["cosine", "l2"]


@define
class Budget:
    """Forwards of one example through the head, and seconds, with a limit on each; 0 is no limit.

    Limits are for each victim, so that an attack of few gets no further than one of many: `turn_of` begins anew.
    """

    most_forwards: int = 0
    most_seconds: float = 0.0
    forwards: int = 0  # of all victims
    _each: int = 0  # of each victim whose turn it is
    _victims: int = 1
    _start: float = field(factory=time.monotonic)

    def turn_of(self, victims: int) -> None:
        """Go on with the next victims, `victims` of them together."""
        self._each, self._victims, self._start = 0, max(victims, 1), time.monotonic()

    def spend(self, each: int, victims: int = 1) -> None:
        """Count `each` forwards of each of these victims."""
        self._each += each
        self.forwards += each * victims

    def spend_unevenly(self, total: int, victims: int) -> None:
        """Count forwards of which some victims took more than others: the limit is then on their mean."""
        self._each += -(-total // victims)
        self.forwards += total

    @property
    def left(self) -> float:
        """Forwards that each victim whose turn it is may still take."""
        return max(self.most_forwards - self._each, 0) if self.most_forwards else math.inf

    def allowance(self, position: int, positions: int, fewest: float) -> float:
        """Forwards that each victim may spend on one of so many positions.

        Half of the budget is for all alike, or `fewest` for each if that is more; the rest is for whoever needs it first.
        """
        if not self.most_forwards:
            return math.inf
        later, kept = positions - position - 1, max(fewest, self.most_forwards / (2 * positions))
        return self.left - later * min(kept, self.left / (later + 1))

    @property
    def spent(self) -> bool:
        """Whether a limit is reached."""
        late = time.monotonic() - self._start > self.most_seconds * self._victims
        many = self._each >= self.most_forwards
        return bool((self.most_seconds and late) or (self.most_forwards and many))


@frozen(eq=False)
class Target:
    """Hidden states to explain, and the pipeline that an attacker believes made them.

    Args:
        observed: (B, T, D), the mean over releases.
        mask: (B, T), bool; rows that are padding explain nothing and are not looked at.
        head: The head, from embeddings.
        defend: The deterministic part of the defense; the identity to who knows of none.
        loss: Mean squared error in units of the observation's mean square, or 1 − cosine.
    """

    observed: Tensor
    mask: Tensor
    head: Any
    defend: Callable[[Tensor], Tensor]
    loss: Loss

    def losses(self, embeds: Tensor, rows: slice = slice(None)) -> Tensor:
        """How badly embeddings (B, T', D) explain the `rows` of each example: (B,)."""
        length = embeds.shape[1]
        hidden = self.head(inputs_embeds=embeds, attention_mask=self.mask[:, :length].long())
        made, seen = self.defend(hidden)[:, rows], self.observed[:, :length][:, rows]
        real = self.mask[:, :length][:, rows].to(made.dtype)
        if self.loss == "cosine":
            away = (1 - cosine_similarity(made, seen, dim=-1)) * real
            return away.sum(1) / real.sum(1).clamp_min(1)
        off = (made - seen).square().sum(-1) * real
        size = (seen.square().sum(-1) * real).sum(1)
        return off.sum(1) / size.clamp_min(1e-12)

    def first(self, length: int) -> Target:
        """The same, of the first positions only."""
        return Target(
            self.observed[:, :length], self.mask[:, :length], self.head, self.defend, self.loss
        )


def deterministic_part(mechanism: Any, parameters: Any) -> Callable[[Tensor], Tensor]:
    """What the defense does to hidden states on purpose, as far as it is known."""
    known = parameters if parameters is not None else mechanism
    return (lambda hidden: hidden) if known is None else known.expected


def descend(
    start: Tensor,  # (B, ...)
    losses: Callable[[Tensor], Tensor],  # -> (B,)
    *,
    steps: int,
    rate: float,
    budget: Budget,
    tell: Callable[[Tensor, Tensor], None] = lambda *_: None,
    decay: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Minimise every example's own loss by Adam, and return the best point of each and its loss.

    The rate falls to zero along half a cosine. Adam works by coordinate, so examples do not touch each other.
    `tell` hears every fifty steps the best points so far and their losses.
    """
    variable = start.detach().clone().requires_grad_()
    optimizer = torch.optim.AdamW([variable], lr=rate, weight_decay=decay)
    best = start.detach().clone()
    lowest = torch.full((len(start),), math.inf, device=start.device)
    with torch.enable_grad():
        for step in range(steps + 1):
            loss = losses(variable)
            budget.spend(1, len(start))
            better = loss.detach() < lowest
            best[better], lowest[better] = variable.detach()[better], loss.detach()[better].float()
            if step == steps or budget.spent:
                break
            optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
            (variable.grad,) = torch.autograd.grad(loss.sum(), variable)
            optimizer.step()
            if step % 50 == 0:
                tell(best, lowest)
    return best, lowest


def descend_by_curvature(
    start: Tensor,  # (B, ...)
    losses: Callable[[Tensor], Tensor],  # -> (B,)
    *,
    steps: int,
    unit: float,
    budget: Budget,
    tell: Callable[[Tensor, Tensor], None] = lambda *_: None,
) -> tuple[Tensor, Tensor]:
    """The same by L-BFGS with a line search (Liu and Nocedal, Mathematical Programming 45, 1989): second-order.

    Lengths are counted in `unit`s, since its first step is of length one. Examples share the steps and the curvature that is learned, their sum is minimised; of each the best point counts.
    """
    variable = (start.detach() / unit).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [variable], max_iter=1, history_size=20, line_search_fn="strong_wolfe",
        tolerance_grad=1e-12, tolerance_change=0.0,
    )  # fmt: skip
    best = start.detach().clone()
    lowest = torch.full((len(start),), math.inf, device=start.device)

    def closure() -> Tensor:
        with torch.enable_grad():
            loss = losses(variable * unit)
            (variable.grad,) = torch.autograd.grad(loss.sum(), variable)
        budget.spend(1, len(start))
        found = loss.detach().float()
        better = found < lowest
        best[better], lowest[better] = variable.detach()[better] * unit, found[better]
        return found.sum()

    for step in range(steps):
        optimizer.step(closure)  # type: ignore[no-untyped-call]
        if budget.spent:
            break
        if step % 50 == 0:
            tell(best, lowest)
    return best, lowest


def around_the_mean(
    table: Tensor, shape: tuple[int, ...], generator: torch.Generator, noise: float = 0.01
) -> Tensor:
    """Start at the mean embedding and a little noise; zero would be degenerate under RMSNorm: (*shape, D)."""
    drawn = torch.randn((*shape, table.shape[1]), generator=generator).to(table)
    return table.mean(0) + noise * rms(table) * drawn


def rms(table: Tensor) -> float:
    """Root mean square of all entries: the unit in which steps and noise are counted."""
    return float(table.square().mean().sqrt())


def nearest_tokens(
    vectors: Tensor, table: Tensor, metric: Metric = "cosine", chunk: int = 4096
) -> Tensor:
    """Return the token whose embedding is nearest to each vector: (..., D), (V, D) → (...)."""
    rows = vectors.reshape(-1, vectors.shape[-1]).split(chunk)
    if metric == "cosine":
        unit = normalize(table, dim=-1)
        found = [(normalize(part, dim=-1) @ unit.T).argmax(-1) for part in rows]
    else:
        size = table.square().sum(-1) / 2
        found = [(part @ table.T - size).argmax(-1) for part in rows]
    return torch.cat(found).view(vectors.shape[:-1])


def batches(mask: Tensor, size: int) -> Iterator[Tensor]:
    """Yield the numbers of examples, those of like length together."""
    yield from mask.sum(1).argsort(descending=True).split(size)


def targets(
    releases: Tensor,  # (R, N, T, D)
    mask: Tensor,  # (N, T)
    head: Any,
    defend: Callable[[Tensor], Tensor],
    loss: Loss,
    size: int,
) -> Iterator[tuple[Tensor, Target]]:
    """Yield numbers of examples and what there is to explain of them, padded to their own longest.

    Raises:
        AttackError: There is nothing to invert.
    """
    if not mask.any():
        raise AttackError("No position of any example is real: there is nothing to invert.")
    observed = releases.mean(0)
    for numbers in batches(mask, size):
        longest = int(mask[numbers].sum(1).max())
        part = observed[numbers, :longest].to(head.device), mask[numbers, :longest].to(head.device)
        yield numbers, Target(*part, head, defend, loss)


def put(tokens: Tensor, numbers: Tensor, found: Tensor, mask: Tensor) -> None:
    """Write what was found of some examples (B, T') into all guesses (N, T), -1 where nothing is real."""
    tokens[numbers, : found.shape[1]] = torch.where(mask, found, -1).to(tokens.device)
