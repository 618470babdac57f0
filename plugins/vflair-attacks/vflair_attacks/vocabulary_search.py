"""Exact search for the text behind hidden states: try every token, keep what explains the observation.

With a causal head, row t depends on tokens ≤ t only, so the text can be found from left to right.
Thomas et al., "Hidden No More", ICML 2025, arXiv 2505.18332; Nikolaou et al., "Language Models are
Injective and Hence Invertible", arXiv 2510.15511.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from attrs import define, field, frozen, validators
from torch import Tensor

from vflair_attacks.descent import Budget
from vflair_attacks.matching import (
    MATCHINGS,
    NEAREST_L1,
    Matching,
    Measure,
    measure_of,
    order_told_by,
)
from vflair_attacks.priors import ModelPrior, Prior
from vflair_attacks.proposals import SOURCES, Proposals, Source, proposals_of
from vflair_core import AttackError, Guess

Progress = Callable[..., None]
# Of the variance of the observations: what rounding leaves when there is no noise.
ROUNDING = 1e-8
DIVERGED = "the model diverged in training, or the noise is without bounds."


@frozen
class VocabularySearch:
    """Beam search over the log-likelihood of the known mechanism, with a language-model prior.

    Maximises Σ_t log p_noise(H̃_t − f(H_t(v))) + prior · log p_LM(v_t | v_<t), where f is the defense's
    deterministic part; repeated releases of a row add up. Without a known noise its
    scale is estimated, for each example, from what the best candidate leaves over. Differs from the papers: a beam
    and a likelihood instead of the nearest candidate in L1, all candidates of a position in one pass; proposals also
    come from a linear map, not from a language model alone.

    Attributes:
        matching: likelihood of the known noise; sorted for permuted hidden dimensions, where a linear map goes by the order that the
            first token tells; support for sparsified rows.
        proposals: Order of candidates: all tries every token; prior, linear and prior+linear try 64, 128, … at a time the
            tokens that the pretrained model, a linear map (linear-inverter) or the sum of both puts first, until one is near.
        candidates: Most of the proposals tried at a position; 0 for no limit. A first token of which nothing is known is looked for
            among all. Where noise leaves no candidate near enough to be
            sure of, this is what makes the search short.
        accept: Distance at which a proposal is taken for the token: in units of the row's norm, with known noise the nats that it
            costs. 0 measures on public text how far true tokens and how far wrong ones are, and tries all where they
            are not apart; where no text is granted it is 1e-4, or with known noise all are tried.
        beam: Hypotheses kept per example.
        prior: Weight of the language model's log-probability; 0 for none.
        margin: A hypothesis this many nats behind the best is dropped.
        chunk: Most candidates tried in one pass.
        group: Examples searched together.
        forwards: Most candidates tried for each victim; 0 for no limit. With proposals it is for the whole text and on average over a
            group: each position tries some, and takes the best. Without, positions that are not reached have no guess.
        seconds: Most seconds for each victim; 0 for no limit. Positions not reached have no guess.
    """

    matching: Matching = field(default="likelihood", validator=validators.in_(MATCHINGS))
    proposals: Source = field(default="all", validator=validators.in_(SOURCES))
    candidates: int = field(default=0, validator=validators.ge(0))
    accept: float = field(default=0.0, validator=validators.ge(0))
    beam: int = field(default=8, validator=validators.ge(1))
    prior: float = field(default=1.0, validator=validators.ge(0))
    margin: float = field(default=50.0, validator=validators.gt(0))
    chunk: int = field(default=128, validator=validators.ge(1))
    group: int = field(default=16, validator=validators.ge(1))
    forwards: int = field(default=0, validator=validators.ge(0))
    seconds: float = field(default=0.0, validator=validators.ge(0))

    def __call__(
        self,
        releases: Tensor,  # (R, N, T, D)
        lengths: Tensor,  # (N,)
        head: Any,
        mechanism: Any = None,
        parameters: Any = None,
        pretrained_model: Any = None,
        tokenizer: Any = None,
        public_texts: Sequence[str] = (),
        generator: torch.Generator | None = None,
        progress: Progress = lambda *_: None,
    ) -> Guess:
        """Return the tokens (N, T) of every example.

        Raises:
            AttackError: The head is not causal, or what the proposals are made of is not granted.
        """
        known = parameters if parameters is not None else mechanism
        measure = measure_of(self.matching, known)
        proposals = proposals_of(
            self, measure, head, known, pretrained_model, tokenizer, public_texts, generator
        )  # fmt: skip
        make = None if pretrained_model is None else partial(ModelPrior, pretrained_model)
        return search(releases, lengths, head, measure, self, make, progress, proposals=proposals)


@frozen
class GreedySearch:
    """The baseline: at each position the one token whose hidden state is nearest in L1.

    Thomas et al., arXiv 2505.18332; with `proposals = "prior"` as there, by default without a proposal model and a
    threshold: all tokens are tried. It knows no mechanism and looks at the first release only.

    Attributes:
        proposals: Order of candidates, as in vocabulary-search.
        candidates: Most of the proposals tried at a position; 0 for no limit.
        accept: Distance, in units of the row's L1 norm, at which a proposal is taken for the token; 0 as in vocabulary-search.
        chunk: Most candidates tried in one pass.
        group: Examples searched together.
    """

    proposals: Source = field(default="all", validator=validators.in_(SOURCES))
    candidates: int = field(default=0, validator=validators.ge(0))
    accept: float = field(default=0.0, validator=validators.ge(0))
    chunk: int = field(default=128, validator=validators.ge(1))
    group: int = field(default=16, validator=validators.ge(1))

    def __call__(
        self,
        releases: Tensor,  # (R, N, T, D)
        lengths: Tensor,  # (N,)
        head: Any,
        pretrained_model: Any = None,
        tokenizer: Any = None,
        public_texts: Sequence[str] = (),
        progress: Progress = lambda *_: None,
    ) -> Guess:
        """Return the tokens (N, T) of every example.

        Raises:
            AttackError: The head is not causal, or what the proposals are made of is not granted.
        """
        plan = VocabularySearch(beam=1, prior=0.0, chunk=self.chunk, group=self.group)
        proposals = proposals_of(
            self, NEAREST_L1, head, None, pretrained_model, tokenizer, public_texts
        )  # fmt: skip
        make = None if pretrained_model is None else partial(ModelPrior, pretrained_model)
        return search(
            releases[:1], lengths, head, NEAREST_L1, plan, make, progress, proposals=proposals
        )


def search(
    releases: Tensor,
    lengths: Tensor,
    head: Any,
    measure: Measure,
    plan: VocabularySearch,
    make_prior: Callable[[], Prior] | None = None,
    progress: Progress = lambda *_: None,
    budget: Budget | None = None,
    proposals: Proposals | None = None,
) -> Guess:
    """Search all examples from left to right, with a prior made anew for each group; without proposals try all tokens.

    Raises:
        AttackError: The head is not causal, or what crossed is not finite.
    """
    if not bool(releases.isfinite().all()):
        raise AttackError(f"What crossed is not finite: {DIVERGED}")
    if not head.is_causal():
        raise AttackError(
            "Vocabulary search needs a causal head: in this one, a row depends on later tokens too. "
            "Use coordinate-search or nearest-embedding."
        )
    count, longest = releases.shape[1:3]
    tokens = torch.full((count, longest), -1)
    budget = budget or Budget(plan.forwards, plan.seconds)
    done, total = 0, int(lengths.sum())
    order = lengths.argsort(descending=True)  # examples of like length together
    for rows in order.split(plan.group):
        seen, long = releases[:, rows].to(head.device), lengths[rows].to(head.device)
        asked = plan.prior or (proposals is not None and proposals.prior)
        prior = make_prior() if make_prior is not None and asked else None
        budget.turn_of(len(rows))
        beam = _Beam(
            seen, long, rows.to(head.device), measure, head, prior, proposals, plan, budget
        )
        with torch.no_grad():
            for position in range(int(lengths[rows].max())):
                if budget.spent:
                    break
                done += beam.advance(position)
                tokens[rows[beam.alive.cpu()], : position + 1] = beam.tokens[:, 0].cpu()
                progress(done, total, None, tokens, budget.forwards)
        for row, sequence in zip(rows.tolist(), beam.finish(), strict=True):
            tokens[row, : len(sequence)] = sequence
    return Guess(tokens=tokens, budget={"forwards": budget.forwards})


@define(slots=False)
class _Beam:
    """The hypotheses for a few examples: `tokens` (N, W, t), `scores` (N, W) in nats, caches of N·W rows."""

    observed: Tensor  # (R, N, T, D)
    lengths: Tensor
    numbers: Tensor  # of the examples, among all
    measure: Measure
    head: Any
    prior: Prior | None
    proposals: Proposals | None
    plan: VocabularySearch
    budget: Budget

    def __attrs_post_init__(self) -> None:
        count = len(self.lengths)
        device = self.lengths.device
        self.alive = torch.arange(count, device=device)
        self.tokens = torch.zeros(count, 1, 0, dtype=torch.long, device=device)
        self.scores = torch.zeros(count, 1, device=device)
        self.cache = self.head.cache()
        self.found: dict[int, Tensor] = {}
        self.order: Tensor | None = None  # of the coordinates, (N, D) of all examples
        spread = [self.observed[:, n, :length].var() for n, length in enumerate(self.lengths)]
        self.scale = (torch.stack(spread) * ROUNDING).clamp_min(1e-30)  # (N,)

    def advance(self, position: int) -> int:
        """Extend every hypothesis by one token and return how many examples were still running."""
        self._retire(position)
        count, width = self.scores.shape
        observed = self.observed[:, self.alive, position]  # (R, N, D)
        said = None
        if self.prior is not None and position:
            said = self.prior.following(self.tokens, self.numbers[self.alive])
        if self.proposals is None:
            scores = self._all_tried(observed)
        else:
            scores = self.proposals.scored(
                observed, said, self.scores.isfinite(), self.head, self.cache, self.measure, self.budget,
                int(self.lengths.max()),
                None if self.order is None else self.order[self.alive],
            )  # fmt: skip
        size = len(observed) * observed.shape[-1]
        gain = self.measure.in_nats(scores, size, self.scale[self.alive])  # (N, W, V)
        if said is not None and self.plan.prior:
            gain = gain + self.plan.prior * said
        total = (self.scores[..., None] + gain).flatten(1)  # (N, W·V)
        vocabulary = gain.shape[-1]
        scores, flat = total.topk(min(self.plan.beam, total.shape[1]), dim=1)
        if bool(scores[:, 0].isnan().any()):
            raise AttackError(f"No token can be compared with what crossed: {DIVERGED}")
        keep = int((scores > scores[:, :1] - self.plan.margin).sum(1).max())
        scores, flat = scores[:, :keep], flat[:, :keep]
        parents, chosen = flat // vocabulary, flat % vocabulary  # (N, W')
        starts = torch.arange(count, device=parents.device)[:, None] * width
        rows = (starts + parents).flatten()
        self._select(rows)
        if self.measure.in_any_order and self.order is None:
            best = self.head.try_tokens(chosen.reshape(-1, 1), self.cache).unflatten(0, (count, -1))
            told = order_told_by(observed.mean(0), self.measure.expected(best[:, 0, 0]))
            self.order = told.new_zeros(len(self.lengths), told.shape[1])
            self.order[self.alive] = told
        self.head.append(chosen.reshape(-1, 1), self.cache)
        earlier = self.tokens.gather(1, parents[..., None].expand(-1, -1, self.tokens.shape[2]))
        self.tokens = torch.cat([earlier, chosen[..., None]], dim=2)
        self.scores = scores - scores[:, :1]  # only differences matter
        return count

    def finish(self) -> list[Tensor]:
        """Return the best sequence of each example, in order."""
        self._retire(int(self.lengths.max()))
        left = zip(self.alive.tolist(), self.tokens[:, 0], strict=True)
        self.found |= {n: sequence for n, sequence in left if n not in self.found}
        return [self.found[n] for n in range(len(self.lengths))]

    def _all_tried(self, observed: Tensor) -> Tensor:
        """Score every token as the next one of every hypothesis: (N, W, V)."""
        count, width = self.scores.shape
        vocabulary = len(self.head.embeddings)
        pieces = []
        for start in range(0, vocabulary, self.plan.chunk):
            last = min(start + self.plan.chunk, vocabulary)
            candidates = torch.arange(start, last, device=observed.device)
            hidden = self.head.try_tokens(candidates.expand(count * width, -1), self.cache)
            hidden = hidden.unflatten(0, (count, width))  # (N, W, C, D)
            self.budget.spend(width * len(candidates), count)
            scored = [self.measure.score(seen[:, None, None], hidden) for seen in observed]
            pieces.append(torch.stack(scored).sum(0))
        return torch.cat(pieces, dim=2)

    def _retire(self, position: int) -> None:
        """Take finished examples out of the beam."""
        going = self.lengths[self.alive] > position
        for slot in (~going).nonzero().flatten().tolist():
            self.found[int(self.alive[slot])] = self.tokens[slot, 0]
        if bool(going.all()):
            return
        width = self.scores.shape[1]
        slots = going.nonzero().flatten()
        self._select((slots[:, None] * width + torch.arange(width, device=slots.device)).flatten())
        self.alive, self.tokens, self.scores = (
            self.alive[going],
            self.tokens[going],
            self.scores[going],
        )

    def _select(self, rows: Tensor) -> None:
        self.cache.batch_select_indices(rows)
        if self.prior is not None:
            self.prior.select(rows)
