"""Say whether a text was trained on, by whether its states lie in the span of a gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from attrs import field, frozen, validators
from torch import Tensor

from vflair_attacks.gradient_spans import Span, inputs_of, span_of
from vflair_core import AttackError, Guess

Progress = Callable[[int, int], None]


@frozen
class MembershipResidual:
    """Score each candidate by how little of its states lies outside the gradient subspace of any example.

    Deng et al., "Toward Efficient Membership Inference Attacks against Federated Large Language Models: A Projection
    Residual Approach" (ProjRes), IEEE S&P 2026, arXiv 2604.21197 (read as an abstract): no shadow models, no training. The states are
    the inputs of attention in the deepest block of the head whose gradient is shared. The last token has no gradient in
    language modelling and is left out. A subspace that is the whole space says nothing and is left out too.

    Attributes:
        rank_tolerance: Singular values below this share of the largest count as zero.
        outside: A candidate is called a member if the mean share outside is below this.
        max_length: Tokens kept of each candidate.
    """

    rank_tolerance: float = field(default=1e-6, validator=validators.gt(0))
    outside: float = field(default=0.05, validator=validators.gt(0))
    max_length: int = field(default=512, validator=validators.ge(2))

    def __call__(
        self,
        updates: Sequence[Mapping[str, Tensor]],
        candidates: Sequence[str],
        lengths: Tensor,  # (N,)
        tokenizer: Any,
        head: Any,
        progress: Progress = lambda *_: None,
    ) -> Guess:
        """Return one score per candidate, above 0 for a member."""
        spans = [span for update in updates if not (span := self._span(update, head)).is_everything]
        longest = min(self.max_length, int(lengths.max()))
        scores = torch.full((len(candidates),), self.outside - 1.0)
        for n, text in enumerate(candidates):
            ids = tokenizer(text, truncation=True, max_length=longest)["input_ids"]
            if spans and len(ids) > 1:
                scores[n] = self.outside - self._outside(ids, spans, head)
            progress(n + 1, len(candidates))
        return Guess(members=scores)

    def _span(self, update: Mapping[str, Tensor], head: Any) -> Span:
        for block in range(head.partition.head - 1, -1, -1):
            span = span_of(update, head, block, self.rank_tolerance)
            if span is not None:
                return span
        raise AttackError(
            "membership-residual needs the gradient of an attention layer in the head. The updates hold "
            f"{', '.join(update) or 'nothing'}."
        )

    def _outside(self, ids: Sequence[int], spans: Sequence[Span], head: Any) -> float:
        """The smallest mean residual of a text's states over all examples' subspaces."""
        text = torch.tensor([ids], device=head.device)
        vectors = inputs_of(head, spans[0].module, text)[0, :-1]
        return min(float(span.residual(vectors).mean()) for span in spans)
