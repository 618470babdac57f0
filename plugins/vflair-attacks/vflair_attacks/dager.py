"""Read text exactly from the gradients of attention layers, when there are fewer tokens than dimensions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from attrs import define, field, frozen, validators
from torch import Tensor

from vflair_attacks.gradient_spans import Span, inputs_of, span_of
from vflair_core import AttackError, Guess

Progress = Callable[[int, int], None]


@frozen
class Dager:
    """Keep the tokens whose first-layer input lies in the gradient's span; put them in order by the second layer.

    Petrov et al., "DAGER: Exact Gradient Inversion for Large Language Models", NeurIPS 2024, arXiv 2405.15586.
    Differs from the paper: one example per update; causal heads only; of the sequences that
    fit, the greedy one is returned, without beams. It works on raw gradients: one step of Adam makes them full rank. A
    position has a gradient only if a later loss depends on it, so the last token of a language-model example is not found.

    Attributes:
        rank_tolerance: Singular values below this share of the largest count as zero.
        first: Largest share of a token's vector outside the first layer's span.
        second: The same for the second layer.
        chunk: Tokens tried in one pass.
    """

    rank_tolerance: float = field(default=1e-6, validator=validators.gt(0))
    first: float = field(default=1e-3, validator=validators.gt(0))
    second: float = field(default=1e-2, validator=validators.gt(0))
    chunk: int = field(default=1024, validator=validators.ge(1))

    def __call__(
        self,
        updates: Sequence[Mapping[str, Tensor]],
        lengths: Tensor,  # (N,)
        head: Any,
        progress: Progress = lambda *_: None,
    ) -> Guess:
        """Return tokens (N, T); -1 from where no token fits."""
        if not head.is_causal():
            raise AttackError(
                "dager puts tokens in order from left to right, which needs a causal head; this one is not."
            )
        tokens = torch.full((len(updates), int(lengths.max())), -1)
        forwards = 0
        for n, (update, length) in enumerate(zip(updates, lengths.tolist(), strict=True)):
            decoder = _Decoder(self, head, *self._spans(update, head))
            found = decoder.decode(length)
            tokens[n, : len(found)] = torch.tensor(found, dtype=torch.long)
            forwards += decoder.forwards
            progress(n + 1, len(updates))
        return Guess(tokens=tokens, budget={"forwards": forwards})

    def _spans(self, update: Mapping[str, Tensor], head: Any) -> tuple[Span, Span | None]:
        model = head.party.model
        first = span_of(update, model, 0, self.rank_tolerance)
        if first is None:
            raise AttackError(
                "dager needs the gradient of the first block's attention (its values, or queries, keys and values "
                f"fused). The updates hold {', '.join(update) or 'nothing'}."
            )
        second = None
        if (
            head.party.partition.head > 1
        ):  # else its second block is the model party's, or in the tail
            second = span_of(update, model, 1, self.rank_tolerance)
        return first, second


@define(slots=False)
class _Decoder:
    """The search for one example."""

    plan: Dager
    head: Any
    first: Span
    second: Span | None
    forwards: int = 0
    used: list[Tensor] = field(factory=list)  # the second layer's inputs of what was found

    def decode(self, length: int) -> list[int]:
        """Return the tokens found, from the left, at most `length`."""
        if self.first.is_everything:
            return []  # as many tokens as dimensions: every token fits
        vocabulary = len(self.head.embeddings)
        some = torch.arange(min(8, vocabulary))
        moves = not torch.equal(self._vectors(some, 0), self._vectors(some, 1))
        if self.second is None and not moves:
            raise AttackError(
                "Without learned positions the first layer gives a bag of tokens. dager puts them in order by the "
                "second block: it needs partition.head of at least 2, and that block trained."
            )
        prefix: list[int] = []
        candidates = None
        for position in range(length):
            if candidates is None or moves:
                candidates, fit = self._fitting(position, vocabulary)
            # LayerNorm takes a dimension from the vectors, so a span can hold all tokens before it is everything.
            if not len(candidates) or len(candidates) > vocabulary // 2:
                break
            chosen = self._best(prefix, candidates, fit)
            if chosen is None:
                break
            prefix.append(chosen)
        return prefix

    def _fitting(self, position: int, vocabulary: int) -> tuple[Tensor, Tensor]:
        """The tokens whose first-layer input lies in the span, and how far each is from it."""
        residuals = [
            self.first.residual(self._vectors(tokens, position))
            for tokens in torch.arange(vocabulary).split(self.plan.chunk)
        ]
        residual = torch.cat(residuals)
        inside = (residual < self.plan.first).nonzero().flatten()
        return inside, residual[inside]

    def _vectors(self, tokens: Tensor, position: int) -> Tensor:
        """First-layer inputs of single tokens at a position: (C, D)."""
        self.forwards += len(tokens)
        places = torch.full((len(tokens), 1), position)
        return inputs_of(self.head, self.first.module, tokens[:, None], position_ids=places)[:, 0]

    def _best(self, prefix: list[int], candidates: Tensor, fit: Tensor) -> int | None:
        """The candidate that fits best after the prefix, by the second layer if there is one."""
        if self.second is None:
            return int(candidates[fit.argmin()])
        if self.second.is_everything:
            return None
        vectors = []
        for tokens in candidates.split(self.plan.chunk):
            before = torch.tensor(prefix, dtype=torch.long).expand(len(tokens), -1)
            ids = torch.cat([before, tokens[:, None]], dim=1)
            vectors.append(inputs_of(self.head, self.second.module, ids)[:, -1])
            self.forwards += len(tokens)
        found = torch.cat(vectors)  # (C, D)
        fits = (self.second.residual(found) < self.plan.second).nonzero().flatten()
        if not len(fits):
            return None
        # With rotary positions "a a" has the states of "a" twice, which is in the span whatever followed: a
        # direction that explains something new goes first.
        new = fits[self._outside_of_used(found[fits]) > self.plan.second]
        among = new if len(new) else fits
        best = among[self.second.residual(found[among]).argmin()]
        self.used.append(found[best])
        return int(candidates[best])

    def _outside_of_used(self, vectors: Tensor) -> Tensor:
        """Share of each vector outside the span of the positions solved so far."""
        if not self.used:
            return torch.ones(len(vectors))
        basis = torch.linalg.qr(torch.stack(self.used).double().T).Q.T
        return Span("", basis).residual(vectors)
