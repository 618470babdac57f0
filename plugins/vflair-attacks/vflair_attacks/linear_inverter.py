"""Read hidden states through one linear map to embeddings, fitted in closed form on public text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from attrs import field, frozen, validators
from torch import Tensor
from torch.nn.functional import normalize

from vflair_attacks.descent import Progress
from vflair_attacks.inverter import Pairs, of_queries, through_head
from vflair_attacks.learning import Draw, tokens_of
from vflair_core import AttackError, Guess, Head


@frozen(eq=False)
class LinearMap:
    """From hidden states to embeddings by a linear map, and from there to tokens by cosine."""

    means: Tensor  # (2, D) of the states: of first positions, and of all others
    spread: Tensor  # (D,)
    weight: Tensor  # (D, D')
    centres: Tensor  # (2, D') of the embeddings, likewise
    table: Tensor  # (V, D'), each of norm 1

    def cosines(self, states: Tensor, position: Tensor) -> Tensor:  # (..., D), (...) -> (..., V)
        """Compare what each state at its position is mapped to with the embedding of every token."""
        later = position.clamp_max(1)
        made = (states - self.means[later]) / self.spread @ self.weight + self.centres[later]
        return normalize(made, dim=-1) @ self.table.T


@frozen
class LinearInverter:
    """Ridge regression from public hidden states to the embeddings of their tokens, then the nearest by cosine.

    Song & Raghunathan, "Information Leakage in Embedding Models", CCS 2020, arXiv 2004.00053, first map deep states
    to shallow ones by least squares, and then invert the shallow ones; here the shallow ones are the embeddings
    themselves, so one matrix is all there is to learn. States are standardised, as deep ones have a few huge
    coordinates. With the mechanism granted public text crosses it first; else the map is fitted on `queries`, which are public
    texts and what they gave; else through the head as if nothing defended. Releases of a victim are averaged.
    Differs from the paper: nothing is optimised. First positions have means of their own and are not fitted on: in many
    models all others look there, and states there are large and far from all others.

    Attributes:
        ridge: λ, in units of one public token: the penalty on the map, states being of variance 1.
        tokens: Public tokens that are enough; 0 for all.
        length: Tokens kept of a public text.
        batch: Public texts sent through the head together.
        queries: Most queries that are learned from; 0 for all. Listed with several, it gives AP against queries.
        chunk: Rows compared with the vocabulary in one pass.
    """

    ridge: float = field(default=10.0, validator=validators.gt(0))
    tokens: int = field(default=16384, validator=validators.ge(0))
    length: int = field(default=64, validator=validators.ge(2))
    batch: int = field(default=16, validator=validators.ge(1))
    queries: int = field(default=0, validator=validators.ge(0))
    chunk: int = field(default=256, validator=validators.ge(1))

    def __call__(
        self,
        releases: Tensor,  # (R, N, T, D)
        mask: Tensor,  # (N, T)
        tokenizer: Any,
        generator: torch.Generator,
        public_texts: Sequence[str] = (),
        in_domain: Sequence[str] = (),
        queries: Pairs = (),
        head: Head | None = None,
        embeddings: Tensor | None = None,
        mechanism: Any = None,
        parameters: Any = None,
        device: torch.device | str = "cpu",
        progress: Progress = lambda *_: None,
    ) -> Guess:
        """Return the tokens (N, T) of every example.

        Raises:
            AttackError: There is neither a head nor an answered query, or no public text, or no embedding table.
        """
        known = parameters if parameters is not None else mechanism
        table = head.vectors() if head is not None else embeddings
        if table is None:
            raise AttackError(
                "linear-inverter maps states to embeddings: grant embeddings, or a head."
            )
        asking = head is None or (known is None and bool(queries))
        if not asking and head is not None:
            rows = tokens_of(tokenizer, [*public_texts, *in_domain], self.length)
            draw, count = through_head(head, rows, known, generator), len(rows)
        elif queries:
            draw, count = of_queries(tokenizer, queries[: self.queries or None], device)
            table = table.to(device)
        else:
            raise AttackError(
                "linear-inverter needs examples of text with hidden states: grant a head, or queries."
            )
        linear, used, read = fitted(draw, count, table, self, progress)
        position = torch.arange(mask.shape[1]).expand(mask.shape)[mask].to(linear.means.device)
        states = releases.mean(0)[mask].to(linear.means)  # (rows, D)
        tokens = mask.long() - 1  # -1 where there is nothing to guess
        parts = zip(states.split(self.chunk), position.split(self.chunk), strict=True)
        tokens[mask] = torch.cat([linear.cosines(*part).argmax(-1) for part in parts]).cpu()
        spent = {"forwards": 0 if asking else used, "public_tokens": read}
        return Guess(tokens=tokens, budget=spent | ({"queries": used} if asking else {}))


def fitted(
    draw: Draw, count: int, table: Tensor, plan: LinearInverter, progress: Progress = lambda *_: None
) -> tuple[LinearMap, int, int]:  # fmt: skip
    """Fit the map on what `draw` gives for numbers of texts below `count`; with it come the texts and tokens it took.

    Only sums over tokens are kept, in double precision: (D, D) and (D, D'), however long the text is.

    Raises:
        AttackError: No text has a second token.
    """
    table = table.detach()
    sums: list[Tensor] = []
    used = tokens = firsts = 0
    for numbers in torch.arange(count).split(plan.batch):
        hidden, ids = draw(numbers)
        real = ids >= 0
        first, real[:, 0] = real[:, 0].clone(), False
        states, targets = hidden[real].double(), table[ids[real]].double()
        new = [
            hidden[first, 0].double().sum(0), table[ids[first, 0]].double().sum(0),
            states.sum(0), targets.sum(0), states.T @ states, states.T @ targets,
        ]  # fmt: skip
        sums = [old + part for old, part in zip(sums, new, strict=True)] if sums else new
        used, tokens, firsts = used + len(numbers), tokens + len(states), firsts + int(first.sum())
        progress(used, count)
        if plan.tokens and tokens >= plan.tokens:
            break
    if not tokens:
        raise AttackError("No public text has more than one token, and the first is not fitted on.")
    return _solved(firsts, tokens, sums, plan.ridge, table), used, tokens


def _solved(firsts: int, count: int, sums: list[Tensor], ridge: float, table: Tensor) -> LinearMap:
    """Solve (ZᵀZ + λ) W = Zᵀ(Y − ȳ) for standardised states Z and embeddings Y."""
    means = torch.stack([sums[0] / firsts, sums[2] / count])
    centres = torch.stack([sums[1] / firsts, sums[3] / count])
    mean, centre = means[1], centres[1]
    scatter = sums[4] - count * mean.outer(mean)
    spread = (scatter.diagonal() / count).clamp_min(0).sqrt()
    spread = spread.clamp_min(1e-6 * float(spread.max()) or 1.0)  # of a coordinate that never moves
    gram = scatter / spread.outer(spread)
    gram.diagonal().add_(ridge)
    right = (sums[5] - count * mean.outer(centre)) / spread[:, None]
    weight = torch.linalg.solve(gram, right)
    means, spread, weight, centres = (
        part.to(table.dtype) for part in (means, spread, weight, centres)
    )
    return LinearMap(means, spread, weight, centres, normalize(table, dim=-1))
