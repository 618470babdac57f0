"""Invert the head: look for embeddings that give the hidden states that were seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from attrs import field, frozen, validators
from torch import Tensor

from vflair_attacks.descent import (
    Budget,
    Loss,
    Metric,
    Progress,
    Target,
    around_the_mean,
    descend,
    descend_by_curvature,
    deterministic_part,
    nearest_tokens,
    put,
    rms,
    targets,
)
from vflair_core import Guess, Head


@frozen
class ModelInversion:
    """Minimise ℓ(D(head(Z)), H) over embeddings Z, and take the nearest token to each row of Z.

    Fredrikson et al., "Model Inversion Attacks", CCS 2015, for the hidden states of a language model, as VMI in
    VFLAIR-LLM. D is the defense's deterministic part where it is known; several releases are averaged first.
    Differs from VFLAIR-LLM: the loss is zero where the states agree (theirs takes a cross-entropy of
    activations, which is not), padding is left out, and the best of several starts counts, by its own loss.

    Attributes:
        loss: mse, in units of the mean square of what was seen, or cosine.
        metric: How the nearest token is found: cosine or l2.
        steps: Steps in each start.
        rate: First step length of Adam, in units of the rms of the embedding table.
        optimizer: adam, or lbfgs: second-order, for smooth heads and few positions; it needs no rate.
        restarts: Starts, each at the mean embedding and a little noise.
        batch: Examples inverted together.
        forwards: Most forwards for each victim; 0 for no limit.
        seconds: Most seconds for each victim; 0 for no limit.
    """

    loss: Loss = field(default="mse", validator=validators.in_(("mse", "cosine")))
    metric: Metric = field(default="cosine", validator=validators.in_(("cosine", "l2")))
    steps: int = field(default=500, validator=validators.ge(1))
    rate: float = field(default=0.1, validator=validators.gt(0))
    optimizer: Literal["adam", "lbfgs"] = field(
        default="adam", validator=validators.in_(("adam", "lbfgs"))
    )
    restarts: int = field(default=3, validator=validators.ge(1))
    batch: int = field(default=16, validator=validators.ge(1))
    forwards: int = field(default=0, validator=validators.ge(0))
    seconds: float = field(default=0.0, validator=validators.ge(0))

    def __call__(
        self,
        releases: Tensor,  # (R, N, T, D)
        mask: Tensor,  # (N, T)
        head: Head,
        generator: torch.Generator,
        mechanism: object = None,
        parameters: object = None,
        progress: Progress = lambda *_: None,
    ) -> Guess:
        """Return the tokens (N, T) of every example."""
        budget, table = Budget(self.forwards, self.seconds), head.vectors()
        tokens, done = torch.full(mask.shape, -1), 0
        defend = deterministic_part(mechanism, parameters)
        for numbers, target in targets(releases, mask, head, defend, self.loss, self.batch):
            budget.turn_of(len(numbers))
            there = numbers, target, done

            def tell(
                embeds: Tensor, lowest: Tensor, there: tuple[Tensor, Target, int] = there
            ) -> None:
                numbers, target, done = there
                put(tokens, numbers, nearest_tokens(embeds, table, self.metric), target.mask)
                progress(done, len(mask), float(lowest.mean()), tokens, budget.forwards)

            embeds = self._invert(target, table, generator, budget, tell)
            put(tokens, numbers, nearest_tokens(embeds, table, self.metric), target.mask)
            done += len(numbers)
            progress(done, len(mask), None, tokens, budget.forwards)
        return Guess(tokens=tokens, budget={"forwards": budget.forwards})

    def _invert(
        self, target: Target, table: Tensor, generator: torch.Generator, budget: Budget,
        tell: Callable[[Tensor, Tensor], None],
    ) -> Tensor:  # fmt: skip
        noise = 1.0 if self.optimizer == "lbfgs" else 0.01  # curvature near zero is none of words
        best = around_the_mean(table, target.mask.shape, generator, noise)
        lowest = torch.full((len(best),), torch.inf, device=best.device)
        for restart in range(self.restarts):
            start = around_the_mean(table, target.mask.shape, generator, noise) if restart else best
            found, loss = self._descend(
                start,
                target,
                table,
                budget,
                lambda now, loss: tell(*_better(now, loss, best, lowest)),
            )
            better = loss < lowest
            best[better], lowest[better] = found[better], loss[better]
            if budget.spent:
                break
        return best

    def _descend(
        self, start: Tensor, target: Target, table: Tensor, budget: Budget,
        tell: Callable[[Tensor, Tensor], None],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        if self.optimizer == "lbfgs":
            return descend_by_curvature(
                start, target.losses, steps=self.steps, unit=rms(table), budget=budget, tell=tell
            )
        return descend(
            start, target.losses, steps=self.steps, rate=self.rate * rms(table), budget=budget, tell=tell
        )  # fmt: skip


def _better(now: Tensor, loss: Tensor, best: Tensor, lowest: Tensor) -> tuple[Tensor, Tensor]:
    """Of each example the better of two points (B, T, D) and its loss (B,)."""
    better = (loss < lowest)[:, None, None]
    return torch.where(better, now, best), torch.minimum(loss, lowest)
