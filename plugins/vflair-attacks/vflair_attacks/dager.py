"""Read texts exactly from the gradients of attention layers, when there are fewer tokens than dimensions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from attrs import define, field, frozen, validators
from torch import Tensor
from torch.nn.functional import normalize

from vflair_attacks.gradient_spans import Span, inputs_of, span_of
from vflair_core import AttackError, Guess

Progress = Callable[[int, int], None]


@frozen
class Dager:
    """Keep the tokens whose first-layer input lies in the gradient's span; put them in order by the second layer.

    Petrov et al., "DAGER: Exact Gradient Inversion for Large Language Models", NeurIPS 2024, arXiv 2405.15586. Texts grow
    from the left, those of one update together: every text found so far is tried with every token, and goes on with
    those whose second-layer input lies in that layer's span. Of all that end, those are returned that explain most
    of the span between them. Differs from the paper: causal heads only, since an encoder has no left to begin at; its
    way of choosing among texts. It works on raw gradients: one step of Adam makes them full rank. A position has a
    gradient only if a later loss depends on it, so the last token of a language-model example is not found.

    Attributes:
        rank_tolerance: Singular values below this share of the largest count as zero.
        first: Largest share of a token's vector outside the first layer's span.
        second: The same for the second layer. Wider suits a head that is only roughly the one of the update, but lets words
            that were there before follow the end of a text.
        beam: Beginnings of texts kept at each position, of all texts of an update together.
        chunk: Tokens tried in one pass.
    """

    rank_tolerance: float = field(default=1e-6, validator=validators.gt(0))
    first: float = field(default=1e-3, validator=validators.gt(0))
    second: float = field(default=1e-3, validator=validators.gt(0))
    beam: int = field(default=64, validator=validators.ge(1))
    chunk: int = field(default=1024, validator=validators.ge(1))

    def __call__(
        self,
        updates: Sequence[Mapping[str, Tensor]],
        lengths: Tensor,  # (N,)
        head: Any,
        progress: Progress = lambda *_: None,
    ) -> Guess:
        """Return tokens (N, T), those of one update in no order; -1 from where no token fits."""
        if not head.is_causal():
            raise AttackError(
                "dager puts tokens in order from left to right, which needs a causal head; this one is not."
            )
        size = len(lengths) // len(updates)
        if size > self.beam:
            raise AttackError(
                f"An update holds {size} victims, and dager keeps beam = {self.beam} beginnings of texts. Give "
                f"options = {{ beam = {2 * size} }} or more."
            )
        tokens = torch.full((len(lengths), int(lengths.max())), -1)
        forwards = 0
        for n, (update, several) in enumerate(zip(updates, lengths.split(size), strict=True)):
            search = _Search(self, head, *self._spans(update, head))
            for row, found in enumerate(search.texts(size, int(several.max())), start=n * size):
                tokens[row, : len(found)] = torch.tensor(found, dtype=torch.long)
            forwards += search.forwards
            progress(n + 1, len(updates))
        return Guess(tokens=tokens, budget={"forwards": forwards})

    def _spans(self, update: Mapping[str, Tensor], head: Any) -> tuple[Span, Span | None]:
        first = span_of(update, head, 0, self.rank_tolerance)
        if first is None:
            raise AttackError(
                "dager needs the gradient of the first block's attention (its values, or queries, keys and values "
                f"fused). The updates hold {', '.join(update) or 'nothing'}."
            )
        second = None
        if head.partition.head > 1:  # else its second block is the model party's, or in the tail
            second = span_of(update, head, 1, self.rank_tolerance)
        return first, second


@frozen(eq=False)
class _Text:
    """The beginning of a text, the second layer's inputs at its positions, and how far outside of the span they lie."""

    tokens: tuple[int, ...] = ()
    inputs: tuple[Tensor, ...] = ()  # T times (D,)
    outside: float = 0.0

    @property
    def unit(self) -> Tensor:
        """Its inputs at length one: (T, D)."""
        return normalize(torch.stack(self.inputs).double(), dim=-1)

    def new(self, known: Tensor, least: float) -> int:
        """How many directions its inputs add to an orthonormal basis `known` (K, D)."""
        inputs = self.unit
        left = inputs - inputs @ known.T @ known
        return int((torch.linalg.svdvals(left) > least).sum())


@define(slots=False)
class _Search:
    """The search for the texts of one update."""

    plan: Dager
    head: Any
    first: Span
    second: Span | None
    forwards: int = 0

    def texts(self, count: int, length: int) -> list[tuple[int, ...]]:
        """Return what is found of `count` texts, each from the left and of at most `length` tokens."""
        if self.first.is_everything or (self.second is not None and self.second.is_everything):
            return []  # as many tokens as dimensions: every token fits
        moves = self._positions_show()
        self._check(count, moves=moves)
        alive, ended = [_Text()], list[_Text]()
        tokens: Tensor | None = None
        for position in range(length):
            if tokens is None or moves:
                tokens, fit = self._fitting(position)
            # LayerNorm takes a dimension from the vectors, so a span can hold all tokens before it is everything.
            if not alive or not len(tokens) or len(tokens) > len(self.head.embeddings) // 2:
                break
            if self.second is None:
                alive = [_Text((*alive[0].tokens, int(tokens[fit.argmin()])))]
                continue
            longer = [self._longer(text, tokens) for text in alive]
            ended += [text for text, some in zip(alive, longer, strict=True) if not some]
            alive = self._best([text for some in longer for text in some])
        return self._chosen([*ended, *alive], count)

    def _positions_show(self) -> bool:
        """Whether what goes into the first layer says where a token stands."""
        some = torch.arange(min(8, len(self.head.embeddings)), device=self.head.device)
        return not torch.equal(self._vectors(some, 0), self._vectors(some, 1))

    def _check(self, count: int, *, moves: bool) -> None:
        if self.second is None and not moves:
            raise AttackError(
                "Without learned positions the first layer gives a bag of tokens. dager puts them in order by the "
                "second block: it needs partition.head of at least 2, and that block trained."
            )
        if self.second is None and count > 1:
            raise AttackError(
                f"The first layer does not say which tokens of {count} texts belong together. dager joins them by the "
                "second block: it needs partition.head of at least 2, and that block trained."
            )

    def _fitting(self, position: int) -> tuple[Tensor, Tensor]:
        """The tokens whose first-layer input lies in the span, and how far each is from it."""
        every = torch.arange(len(self.head.embeddings), device=self.head.device)
        residuals = [
            self.first.residual(self._vectors(tokens, position))
            for tokens in every.split(self.plan.chunk)
        ]
        residual = torch.cat(residuals)
        inside = (residual < self.plan.first).nonzero().flatten()
        return inside, residual[inside]

    def _vectors(self, tokens: Tensor, position: int) -> Tensor:
        """First-layer inputs of single tokens at a position: (C, D)."""
        self.forwards += len(tokens)
        places = torch.full((len(tokens), 1), position, device=tokens.device)
        return inputs_of(self.head, self.first.module, tokens[:, None], position_ids=places)[:, 0]

    def _longer(self, text: _Text, tokens: Tensor) -> list[_Text]:
        """The text with each further token whose second-layer input lies in the span."""
        assert self.second is not None  # else there is nothing to choose by
        found = []
        for some in tokens.split(self.plan.chunk):
            before = torch.tensor(text.tokens, dtype=torch.long, device=some.device)
            ids = torch.cat([before.expand(len(some), -1), some[:, None]], dim=1)
            vectors = inputs_of(self.head, self.second.module, ids)[:, -1]  # (C, D)
            self.forwards += len(some)
            residual = self.second.residual(vectors)
            for n in (residual < self.plan.second).nonzero().flatten().tolist():
                outside = text.outside + float(residual[n])
                inputs = (*text.inputs, vectors[n])
                found.append(_Text((*text.tokens, int(some[n])), inputs, outside))
        return found

    def _best(self, texts: list[_Text]) -> list[_Text]:
        """As many as the beam holds.

        With rotary positions "a a" has the states of "a" twice, which are in the span whatever followed: texts whose
        states are of more directions go first.
        """
        if len(texts) <= self.plan.beam:
            return texts
        nothing = self.second.basis[:0]  # type: ignore[union-attr]
        least = self.plan.second
        ranked = sorted(texts, key=lambda text: (-text.new(nothing, least), text.outside))
        return ranked[: self.plan.beam]

    def _chosen(self, texts: list[_Text], count: int) -> list[tuple[int, ...]]:
        """Take, one after the other, the text that explains most of what those before it do not."""
        if self.second is None:
            return [text.tokens for text in texts]
        texts = [text for text in texts if text.tokens]
        known = self.second.basis[:0]
        chosen: list[tuple[int, ...]] = []
        while texts and len(chosen) < count:
            gains = [text.new(known, self.plan.second) for text in texts]
            best = max(range(len(texts)), key=lambda n: (gains[n], -texts[n].outside))
            if not gains[best]:
                break
            text = texts.pop(best)
            chosen.append(text.tokens)
            every = torch.cat([known, text.unit])
            _, sizes, right = torch.linalg.svd(every, full_matrices=False)
            known = right[sizes > self.plan.rank_tolerance * sizes[0]]
        return chosen
