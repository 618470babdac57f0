"""What a search believes of the next token before it looks at the observation."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from attrs import define
from torch import Tensor

from vflair_core import cache_argument


class Prior(Protocol):
    """log p(next token), for W hypotheses of each of N examples; asked from the second position on."""

    def following(self, tokens: Tensor, alive: Tensor) -> Tensor:
        """Return log p (N, W, V) after `tokens` (N, W, t); `alive` (N,) are the numbers of the examples."""

    def select(self, rows: Tensor) -> None:
        """Keep of the N·W hypotheses these, in this order, some perhaps twice."""


@define
class ModelPrior:
    """A causal language model, with a cache of what it has read."""

    model: Any
    cache: Any = None

    def following(self, tokens: Tensor, alive: Tensor) -> Tensor:
        latest = tokens[:, :, -1].reshape(-1, 1)
        name = cache_argument(self.model)
        outputs = self.model(input_ids=latest, use_cache=True, **{name: self.cache})
        self.cache = outputs[name]
        return outputs.logits[:, -1].log_softmax(-1).unflatten(0, tokens.shape[:2])  # type: ignore[no-any-return]

    def select(self, rows: Tensor) -> None:
        if self.cache is not None:
            self.cache.batch_select_indices(rows)


@define
class ReturnedPrior:
    """What a tail makes of the states that the model party returned: log p (N, T, V), the same for all hypotheses."""

    said: Tensor

    def following(self, tokens: Tensor, alive: Tensor) -> Tensor:
        said = self.said[alive, tokens.shape[2] - 1]  # (N, V)
        return said[:, None].expand(-1, tokens.shape[1], -1)

    def select(self, rows: Tensor) -> None:
        """There is nothing to keep."""


class BigramPrior:
    """Pairs of tokens in public text, mixed with single tokens, each seen once more than it was.

    Args:
        rows: Token ids (T,) of each public text.
        vocabulary: V.
        pairs: Weight of the pairs.
    """

    def __init__(self, rows: Sequence[Tensor], vocabulary: int, pairs: float = 0.8) -> None:
        counts: dict[int, Counter[int]] = defaultdict(Counter)
        single = torch.ones(vocabulary)
        for row in rows:
            single += torch.bincount(row, minlength=vocabulary)
            ids = row.tolist()
            for before, after in itertools.pairwise(ids):
                counts[before][after] += 1
        self.single = single / single.sum()  # (V,)
        self.weight = pairs
        self.after = {
            token: (torch.tensor(list(c)), torch.tensor(list(c.values())) / c.total())
            for token, c in counts.items()
        }

    def following(self, tokens: Tensor, alive: Tensor) -> Tensor:
        latest = tokens[:, :, -1].flatten().tolist()
        said = self.single.repeat(len(latest), 1)
        for row, token in enumerate(latest):
            if token in self.after:
                ids, share = self.after[token]
                said[row] *= 1 - self.weight
                said[row, ids] += self.weight * share
        return said.log().unflatten(0, tokens.shape[:2]).to(tokens.device)

    def select(self, rows: Tensor) -> None:
        """There is nothing to keep."""
