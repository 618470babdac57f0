"""Search for the text behind an encoder's hidden states, one position at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from attrs import define, field, frozen, validators
from torch import Tensor

from vflair_attacks.descent import Budget, Progress, batches
from vflair_attacks.inverter import LearnedInverter
from vflair_attacks.matching import MATCHINGS, Matching, Measure, measure_of
from vflair_core import AttackError, Guess, Head


@frozen
class CoordinateSearch:
    """Change one token at a time to what explains all rows best, until no change helps.

    For encoders, where every row depends on every token and a text cannot be found from left to right. It starts at
    the token whose repetition over the whole text is nearest at each position, which needs nothing learned, or at the
    guess of a learned inverter. Candidates of a position are the tokens nearest in that table. Our own adaption of
    exact search (arXiv 2505.18332, 2510.15511) to encoders; works for causal heads too, where vocabulary-search
    is cheaper.

    Attributes:
        start: nearest, or inverter, which needs public text and its tokenizer.
        matching: likelihood of the known noise; sorted for permuted hidden dimensions; support for sparsified rows.
        candidates: Tokens tried at each position; 0 tries all.
        sweeps: Most times all positions are gone through; it ends earlier when nothing changes.
        chunk: Texts in one pass.
        forwards: Most texts through the head for each victim; 0 for no limit.
        seconds: Most seconds for each victim; 0 for no limit.
    """

    start: str = field(default="nearest", validator=validators.in_(("nearest", "inverter")))
    matching: Matching = field(default="likelihood", validator=validators.in_(MATCHINGS))
    candidates: int = field(default=64, validator=validators.ge(0))
    sweeps: int = field(default=4, validator=validators.ge(1))
    chunk: int = field(default=256, validator=validators.ge(1))
    forwards: int = field(default=0, validator=validators.ge(0))
    seconds: float = field(default=0.0, validator=validators.ge(0))

    def __call__(
        self,
        releases: Tensor,  # (R, N, T, D)
        mask: Tensor,  # (N, T)
        head: Head,
        generator: torch.Generator,
        tokenizer: Any = None,
        public_texts: Sequence[str] = (),
        mechanism: Any = None,
        parameters: Any = None,
        progress: Progress = lambda *_: None,
    ) -> Guess:
        """Return the tokens (N, T) of every example.

        Raises:
            AttackError: The start is an inverter, and no tokenizer is granted.
        """
        known = parameters if parameters is not None else mechanism
        measure = measure_of(self.matching, known)
        budget = Budget(self.forwards, self.seconds)
        first = None
        if self.start == "inverter":
            if tokenizer is None:
                raise AttackError(
                    "start = 'inverter' learns on public text: grant a tokenizer too."
                )
            learned = LearnedInverter(forwards=self.forwards, seconds=self.seconds)(
                releases, mask, tokenizer, generator, public_texts=public_texts, head=head,
                mechanism=mechanism, parameters=parameters,
            )  # fmt: skip
            first = learned.tokens
        tokens, done = torch.full(mask.shape, -1), 0
        for numbers in batches(mask, 1):
            number, length = int(numbers), int(mask[numbers].sum())
            if not length:
                continue
            seen = releases[:, number, :length].to(head.device)  # (R, T, D)
            budget.turn_of(1)
            one = _One(seen, head, measure, budget, self)
            tokens[number, :length] = one.search(
                None if first is None else first[number, :length]
            ).cpu()
            done += 1
            progress(done, len(mask), one.objective, tokens, budget.forwards)
        return Guess(tokens=tokens, budget={"forwards": budget.forwards})


@define(slots=False)
class _One:
    """The search for one example."""

    observed: Tensor  # (R, T, D)
    head: Head
    measure: Measure
    budget: Budget
    plan: CoordinateSearch
    objective: float = float("-inf")

    def search(self, first: Tensor | None) -> Tensor:  # (T,) -> (T,)
        with torch.no_grad():
            table = self._alone()  # (V, T)
            tokens = table.argmax(0) if first is None else first.to(table.device)
            count = self.plan.candidates or len(table)
            likely = table.topk(min(count, len(table)), dim=0).indices  # (K, T)
            self.objective = float(self._scores(tokens[None]).sum())
            for _ in range(self.plan.sweeps):
                before = tokens.clone()
                for position in range(len(tokens)):
                    if self.budget.spent:
                        return tokens
                    tokens = self._improve(tokens, position, likely[:, position])
                if torch.equal(tokens, before):
                    break
        return tokens

    def _alone(self) -> Tensor:
        """How well each token, repeated over the whole text, explains each row: (V, T)."""
        vocabulary, length = len(self.head.embeddings), self.observed.shape[1]
        every = torch.arange(vocabulary, device=self.observed.device)
        return self._scores(every[:, None].expand(-1, length))

    def _improve(self, tokens: Tensor, position: int, likely: Tensor) -> Tensor:
        tried = tokens.repeat(len(likely), 1)
        tried[:, position] = likely
        scores = self._scores(tried).sum(1)
        best = int(scores.argmax())
        if float(scores[best]) <= self.objective:
            return tokens
        self.objective = float(scores[best])
        return tried[best]

    def _scores(self, texts: Tensor) -> Tensor:
        """How well the hidden states of texts (B, T) explain each row, over all releases: (B, T)."""
        self.budget.spend(len(texts))
        pieces = []
        for part in texts.split(self.plan.chunk):
            hidden = self.head(part)
            said = [self.measure.score(seen[None], hidden) for seen in self.observed]
            pieces.append(torch.stack(said).sum(0))
        return torch.cat(pieces)
