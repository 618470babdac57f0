"""Take the noise off hidden states while the text is decoded: scale of the noise and text explain each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import attrs
import torch
from attrs import field, frozen, validators
from torch import Tensor

from vflair_attacks.descent import Budget, Progress
from vflair_attacks.learning import tokens_of
from vflair_attacks.matching import Measure, measure_of
from vflair_attacks.priors import BigramPrior, ModelPrior, Prior
from vflair_attacks.proposals import SOURCES, Proposals, Source, proposals_of
from vflair_attacks.vocabulary_search import VocabularySearch, search
from vflair_core import AttackError, Guess, Head


@frozen
class BeamClean:
    """Beam search under noise of unknown scale: decode, measure what is left over, decode again.

    "BeamClean: Language Aware Embedding Reconstruction", arXiv 2505.13758, for noisy embeddings and, through a head, for
    noisy hidden states. The scale is fitted by expectation–maximisation in which the best hypothesis stands for all
    (hard EM), from the distance of the nearest candidates at the first positions upward. The prior is the pretrained model
    where it is granted, else pairs of tokens in public text, else none. Differs from the paper: one scale for all
    coordinates instead of a noise model per coordinate; the deterministic part of a known defense is applied first.
    With embeddings alone (K1) it takes the smashed data for noisy embeddings, so the cut must be right behind them
    and the model must add no positions to them (rotary families).

    Attributes:
        noise: gaussian (squared distances) or laplace (absolute ones).
        rounds: Most times scale and text are fitted in turn; it ends earlier when the scale stays within 1 %.
        proposals: Order of candidates, as in vocabulary-search, whose head, prior and public text it takes.
        candidates: Most of the proposals tried at a position; 0 for no limit. Through noise none is near enough to stop earlier.
        beam: Hypotheses kept per example.
        prior: Weight of the prior's log-probability; 0 for none.
        chunk: Candidates tried in one pass.
        group: Examples searched together.
        length: Tokens kept of a public text.
        forwards: Most candidates tried for each victim in a round; 0 for no limit.
        seconds: Most seconds for each victim in a round; 0 for no limit.
    """

    noise: Literal["gaussian", "laplace"] = field(
        default="gaussian", validator=validators.in_(("gaussian", "laplace"))
    )
    rounds: int = field(default=4, validator=validators.ge(1))
    proposals: Source = field(default="all", validator=validators.in_(SOURCES))
    candidates: int = field(default=0, validator=validators.ge(0))
    beam: int = field(default=8, validator=validators.ge(1))
    prior: float = field(default=1.0, validator=validators.ge(0))
    chunk: int = field(default=128, validator=validators.ge(1))
    group: int = field(default=16, validator=validators.ge(1))
    length: int = field(default=64, validator=validators.ge(1))
    forwards: int = field(default=0, validator=validators.ge(0))
    seconds: float = field(default=0.0, validator=validators.ge(0))

    def __call__(
        self,
        releases: Tensor,  # (R, N, T, D)
        lengths: Tensor,  # (N,)
        head: Head | None = None,
        embeddings: Tensor | None = None,
        tokenizer: Any = None,
        public_texts: Sequence[str] = (),
        pretrained_model: Any = None,
        mechanism: Any = None,
        parameters: Any = None,
        generator: torch.Generator | None = None,
        progress: Progress = lambda *_: None,
    ) -> Guess:
        """Return the tokens (N, T) of every example, and the fitted scale in the budget.

        Raises:
            AttackError: Neither a head nor embeddings are granted, the head is not causal, or what the proposals are made of
                is not granted.
        """
        there: Any = head
        if there is None:
            if embeddings is None:
                raise AttackError(
                    "beam-clean needs candidates to compare with: grant embeddings or a head."
                )
            if pretrained_model is not None:
                embeddings = embeddings.to(pretrained_model.device)
            there = TableHead(embeddings)
        known = parameters if parameters is not None else mechanism
        expected = (lambda hidden: hidden) if known is None else known.expected
        make = self._prior(pretrained_model, tokenizer, public_texts, len(there.embeddings))
        budget = Budget(self.forwards, self.seconds)
        plan = VocabularySearch(
            beam=self.beam, prior=self.prior, chunk=self.chunk, group=self.group
        )
        proposals = self._proposals(
            head, known, pretrained_model, tokenizer, public_texts, generator
        )
        scale = self._first_scale(releases, there, expected)
        for _ in range(self.rounds):
            measure = Measure(partial(self._score, expected, scale), "known")
            guess = search(
                releases, lengths, there, measure, plan, make, progress, budget, proposals
            )
            before, scale = scale, self._scale(guess.tokens, releases, lengths, there, expected)
            if budget.spent or abs(scale - before) < 0.01 * before:
                break
        return attrs.evolve(guess, budget={"forwards": budget.forwards, "scale": scale})

    def _proposals(
        self, head: Head | None, known: Any, model: Any, tokenizer: Any, texts: Sequence[str],
        generator: torch.Generator | None,
    ) -> Proposals | None:  # fmt: skip
        if self.proposals == "all":
            return None
        if head is None:
            raise AttackError(
                f'proposals = "{self.proposals}" takes a head, which K2 grants. With embeddings alone it can be "all".'
            )
        plan = VocabularySearch(
            proposals=self.proposals, candidates=self.candidates, chunk=self.chunk
        )
        measure = measure_of("likelihood", known)
        made = proposals_of(plan, measure, head, known, model, tokenizer, texts, generator)
        return made and attrs.evolve(made, accept=0.0)

    def _prior(
        self, model: Any, tokenizer: Any, texts: Sequence[str], vocabulary: int
    ) -> Callable[[], Prior] | None:
        if not self.prior:
            return None
        if model is not None:
            return partial(ModelPrior, model)
        if tokenizer is None or not texts:
            return None
        pairs = BigramPrior(tokens_of(tokenizer, texts, self.length), vocabulary)
        return lambda: pairs

    def _off(self, observed: Tensor, made: Tensor) -> Tensor:
        """Squared differences for Gaussian noise, absolute ones for Laplace."""
        off = observed - made
        return off.square() if self.noise == "gaussian" else off.abs()

    def _score(
        self, expected: Callable[[Tensor], Tensor], scale: float, observed: Tensor, hidden: Tensor
    ) -> Tensor:
        """Log-likelihood, up to what all candidates share."""
        unit = 2 * scale**2 if self.noise == "gaussian" else scale
        return -self._off(observed, expected(hidden)).sum(-1) / unit

    def _spread(self, off: Tensor) -> float:
        mean = float(off.mean().clamp_min(1e-12))
        return mean**0.5 if self.noise == "gaussian" else mean

    def _first_scale(
        self, releases: Tensor, head: Any, expected: Callable[[Tensor], Tensor]
    ) -> float:
        """The scale that the nearest single token leaves at the first position of each example."""
        with torch.no_grad():
            every = torch.arange(len(head.embeddings), device=head.device)[None]
            first = releases[:, :, 0].mean(0).to(head.device)  # (N, D)
            off = []
            for tokens in every.split(self.chunk, dim=1):
                made = expected(head.try_tokens(tokens, head.cache())[0])  # (C, D)
                off.append(torch.stack([self._off(row, made).mean(-1).min() for row in first]))
            nearest = torch.stack(off).min(0).values  # (N,)
        # The mean over releases is less noisy than each of them.
        factor = len(releases) if self.noise == "gaussian" else len(releases) ** 0.5
        return self._spread(nearest * factor)

    def _scale(
        self, tokens: Tensor | None, releases: Tensor, lengths: Tensor, head: Any,
        expected: Callable[[Tensor], Tensor],
    ) -> float:  # fmt: skip
        """The scale that the decoded texts leave."""
        assert tokens is not None
        left = []
        with torch.no_grad():
            for number, length in enumerate(lengths.tolist()):
                row = tokens[number, :length].to(head.device)
                row = row[row >= 0]  # all, unless the budget was spent
                if len(row):
                    made = expected(head(row[None])[0])
                    left.append(self._off(releases[:, number, : len(row)].to(head.device), made))
        return self._spread(torch.cat([part.flatten() for part in left]))


class _NoCache:
    def batch_select_indices(self, rows: Tensor) -> None:
        """A row of the table depends on nothing before it."""


@frozen(eq=False)
class TableHead:
    """An embedding table (V, D) where a causal head is expected."""

    embeddings: Tensor

    @property
    def device(self) -> torch.device:
        return self.embeddings.device

    def __call__(self, input_ids: Tensor) -> Tensor:
        return self.embeddings[input_ids]

    def cache(self) -> _NoCache:
        return _NoCache()

    def try_tokens(self, tokens: Tensor, cache: _NoCache) -> Tensor:
        return self.embeddings[tokens]

    def append(self, tokens: Tensor, cache: _NoCache) -> Tensor:
        return self.embeddings[tokens]

    def is_causal(self) -> bool:
        return True
