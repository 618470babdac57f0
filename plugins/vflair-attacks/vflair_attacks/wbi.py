"""Invert the head over relaxed tokens: a softmax over the vocabulary at each position, block by block."""

from __future__ import annotations

import torch
from attrs import field, frozen, validators
from torch import Tensor

from vflair_attacks.descent import (
    Budget,
    Loss,
    Progress,
    Target,
    descend,
    deterministic_part,
    put,
    targets,
)
from vflair_core import Guess, Head


@frozen
class WhiteBoxInversion:
    """Minimise ℓ(D(head(softmax(Z/τ)·E)), H) over Z, and take the largest entry of each row of Z.

    Song & Raghunathan, "Information Leakage in Embedding Models", CCS 2020, arXiv 2004.00053, as WBI in VFLAIR-LLM, with a
    loss that is zero where the states agree. Differs from the paper: positions are fitted in blocks, because Z
    with its gradient, Adam's two moments and the softmax takes about 32 bytes for each position, example and token of
    the vocabulary. With a causal head blocks go from left to right; else they are gone through several times.
    D is the defense's deterministic part where it is known; several releases are averaged first.

    Attributes:
        temperature: τ.
        loss: mse, in units of the mean square of what was seen, or cosine.
        block: Positions fitted together.
        steps: Steps of Adam for each block.
        rate: First step length.
        sweeps: Times all blocks are gone through, if the head is not causal.
        batch: Examples inverted together.
        forwards: Most forwards for each victim; 0 for no limit.
        seconds: Most seconds for each victim; 0 for no limit.
    """

    temperature: float = field(default=0.05, validator=validators.gt(0))
    loss: Loss = field(default="mse", validator=validators.in_(("mse", "cosine")))
    block: int = field(default=16, validator=validators.ge(1))
    steps: int = field(default=300, validator=validators.ge(1))
    rate: float = field(default=0.02, validator=validators.gt(0))
    sweeps: int = field(default=2, validator=validators.ge(1))
    batch: int = field(default=8, validator=validators.ge(1))
    forwards: int = field(default=0, validator=validators.ge(0))
    seconds: float = field(default=0.0, validator=validators.ge(0))

    def __call__(
        self,
        releases: Tensor,  # (R, N, T, D)
        mask: Tensor,  # (N, T)
        head: Head,
        mechanism: object = None,
        parameters: object = None,
        progress: Progress = lambda *_: None,
    ) -> Guess:
        """Return the tokens (N, T) of every example."""
        budget, table, causal = (
            Budget(self.forwards, self.seconds),
            head.vectors(),
            head.is_causal(),
        )
        sweeps = 1 if causal else self.sweeps
        tokens, done, total = torch.full(mask.shape, -1), 0, sweeps * int(mask.sum())
        defend = deterministic_part(mechanism, parameters)
        for numbers, target in targets(releases, mask, head, defend, self.loss, self.batch):
            budget.turn_of(len(numbers))
            embeds = table.mean(0).repeat(*target.mask.shape, 1)  # (B, T, D), relaxed or decoded
            found = torch.full(target.mask.shape, -1, device=table.device)
            for _ in range(sweeps):
                for start in range(0, target.mask.shape[1], self.block):
                    rows = slice(start, min(start + self.block, target.mask.shape[1]))
                    found[:, rows], objective = self._fit(
                        embeds, rows, target, table, budget, causal=causal
                    )
                    embeds[:, rows] = table[found[:, rows]]
                    done += int(target.mask[:, rows].sum())
                    put(tokens, numbers, found, target.mask)
                    progress(done, total, objective, tokens, budget.forwards)
        return Guess(tokens=tokens, budget={"forwards": budget.forwards})

    def _fit(
        self, embeds: Tensor, rows: slice, target: Target, table: Tensor, budget: Budget, *,
        causal: bool,
    ) -> tuple[Tensor, float]:  # fmt: skip
        """Fit the tokens of `rows`, all others as they are: (B, t), and the mean loss."""

        def losses(scores: Tensor) -> Tensor:  # (B, t, V)
            relaxed = (scores / self.temperature).softmax(-1) @ table
            before, after = embeds[:, : rows.start], embeds[:, rows.stop :]
            if causal:  # what comes later explains nothing of these rows
                return target.losses(torch.cat([before, relaxed], dim=1), rows)
            return target.losses(torch.cat([before, relaxed, after], dim=1))

        shape = (len(embeds), rows.stop - rows.start, len(table))
        start = torch.zeros(shape, device=table.device)  # every token alike
        scores, lowest = descend(start, losses, steps=self.steps, rate=self.rate, budget=budget)
        return scores.argmax(-1), float(lowest.mean())
