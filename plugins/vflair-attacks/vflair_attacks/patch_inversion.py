"""Invert the head patch by patch: long texts diverge when all positions move at once."""

from __future__ import annotations

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
    deterministic_part,
    nearest_tokens,
    put,
    rms,
    targets,
)
from vflair_core import AttackError, Guess, Head


@frozen
class PatchInversion:
    """Model inversion from left to right: a patch is fitted with all earlier ones frozen, then all together.

    The prompt half of PIDI, arXiv 2606.14210 (patch-wise model inversion). A causal head makes it right: rows of a
    patch do not depend on what comes later. Differs from the paper: each patch has several starts, of which the
    best counts by its own loss, and D, the defense's deterministic part, is inside the loss. We had a summary of
    the paper and not its code.

    Attributes:
        patch: Positions fitted together.
        loss: mse, in units of the mean square of what was seen, or cosine.
        metric: How the nearest token is found: cosine or l2.
        steps: Steps of Adam for each patch and start.
        refine: Steps of Adam for all positions together at the end; 0 for none.
        rate: First step length, in units of the rms of the embedding table; a tenth of it at the end.
        restarts: Starts of each patch.
        batch: Examples inverted together.
        forwards: Most forwards for each victim; 0 for no limit.
        seconds: Most seconds for each victim; 0 for no limit.
    """

    patch: int = field(default=4, validator=validators.ge(1))
    loss: Loss = field(default="mse", validator=validators.in_(("mse", "cosine")))
    metric: Metric = field(default="cosine", validator=validators.in_(("cosine", "l2")))
    steps: int = field(default=200, validator=validators.ge(1))
    refine: int = field(default=100, validator=validators.ge(0))
    rate: float = field(default=0.1, validator=validators.gt(0))
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
        """Return the tokens (N, T) of every example.

        Raises:
            AttackError: The head is not causal.
        """
        if not head.is_causal():
            raise AttackError(
                "Patches from left to right need a causal head: in this one, a row depends on later tokens "
                "too. Use vmi."
            )
        budget, table = Budget(self.forwards, self.seconds), head.vectors()
        tokens, done, total = torch.full(mask.shape, -1), 0, int(mask.sum())
        defend = deterministic_part(mechanism, parameters)
        for numbers, target in targets(releases, mask, head, defend, self.loss, self.batch):
            budget.turn_of(len(numbers))
            embeds = torch.empty(len(numbers), 0, table.shape[1], device=table.device)
            for start in range(0, target.mask.shape[1], self.patch):
                embeds, objective = self._extend(embeds, target, table, generator, budget)
                done += int(target.mask[:, start : start + self.patch].sum())
                there = target.mask[:, : embeds.shape[1]]
                put(tokens, numbers, nearest_tokens(embeds, table, self.metric), there)
                progress(done, total, objective, tokens, budget.forwards)
            if self.refine:
                embeds, _ = descend(
                    embeds, target.losses, steps=self.refine, rate=self.rate * rms(table) / 10,
                    budget=budget,
                )  # fmt: skip
            put(tokens, numbers, nearest_tokens(embeds, table, self.metric), target.mask)
        return Guess(tokens=tokens, budget={"forwards": budget.forwards})

    def _extend(
        self, earlier: Tensor, target: Target, table: Tensor, generator: torch.Generator,
        budget: Budget,
    ) -> tuple[Tensor, float]:  # fmt: skip
        """Fit the next patch behind `earlier` (B, t, D), and return both and the mean loss of the patch."""
        rows = slice(earlier.shape[1], min(earlier.shape[1] + self.patch, target.mask.shape[1]))
        shape = (len(earlier), rows.stop - rows.start)

        def losses(patch: Tensor) -> Tensor:
            return target.losses(torch.cat([earlier, patch], dim=1), rows)

        best = around_the_mean(table, shape, generator)
        lowest = torch.full((len(earlier),), torch.inf, device=table.device)
        for restart in range(self.restarts):
            start = best if restart == 0 else around_the_mean(table, shape, generator)
            found, loss = descend(
                start, losses, steps=self.steps, rate=self.rate * rms(table), budget=budget
            )
            better = loss < lowest
            best[better], lowest[better] = found[better], loss[better]
            if budget.spent:
                break
        return torch.cat([earlier, best], dim=1), float(lowest.mean())
