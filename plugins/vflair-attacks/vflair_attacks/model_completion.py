"""Read what follows off the states that the model party itself returned: the public tail completes the model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from attrs import field, frozen, validators
from torch import Tensor

from vflair_attacks.descent import Progress
from vflair_attacks.matching import MATCHINGS, Matching, measure_of
from vflair_attacks.priors import ReturnedPrior
from vflair_attacks.proposals import SOURCES, Source, proposals_of
from vflair_attacks.vocabulary_search import VocabularySearch, search
from vflair_core import AttackError, Guess, Head, Tail


@frozen
class ModelCompletion:
    """Guess each next token as the one a known tail finds most likely: a logit lens at the cut.

    Fu et al., "Label Inference Attacks Against Vertical Federated Learning", USENIX Security 2022, in the form that
    needs no training: the pretrained tail is public (arXiv 2606.14210). In HT the logits cross as they are. The first
    token is not seen. It reads answers, which a model predicts well, rather than prompts.
    """

    def __call__(
        self,
        returned: Tensor,  # (N, T, D), or logits in HT
        mask: Tensor,  # (N, T)
        task_kind: str,
        tail: Tail | None = None,
        logits: Tensor | None = None,
    ) -> Guess:
        """Return the tokens (N, T) of every example.

        Raises:
            AttackError: The task predicts no tokens, or in HBT no tail is granted.
        """
        said = said_by_tail(returned, mask, task_kind, tail, logits)
        tokens = torch.full(mask.shape, -1)
        tokens[:, 1:] = torch.where(mask[:, 1:], said[:, :-1].argmax(-1).cpu(), -1)
        return Guess(tokens=tokens, budget={"forwards": 0})


@frozen
class JointInversion:
    """Search for the text behind the smashed data, with what the returned states say as prior.

    The two halves of PIDI, arXiv 2606.14210, in one objective: Σ_t log p_noise(H̃_t − f(H_t(v))) + prior ·
    log p_tail(v_t | O_{t−1}). Where noise hides a row of the prompt's states, the model party's own answer to the row
    before it still narrows the token down. Differs from the paper, which inverts prompt and response one after the
    other by optimisation.

    Attributes:
        matching: likelihood of the known noise; sorted for permuted hidden dimensions; support for sparsified rows.
        proposals: Order of candidates, as in vocabulary-search; prior is what the tail says.
        candidates: Most of the proposals tried at a position; 0 for no limit.
        accept: Distance at which a proposal is taken for the token, as in vocabulary-search.
        beam: Hypotheses kept per example.
        prior: Weight of the tail's log-probability.
        chunk: Candidates tried in one pass.
        group: Examples searched together.
        forwards: Most candidates tried for each victim; 0 for no limit.
        seconds: Most seconds for each victim; 0 for no limit.
    """

    matching: Matching = field(default="likelihood", validator=validators.in_(MATCHINGS))
    proposals: Source = field(default="all", validator=validators.in_(SOURCES))
    candidates: int = field(default=0, validator=validators.ge(0))
    accept: float = field(default=0.0, validator=validators.ge(0))
    beam: int = field(default=8, validator=validators.ge(1))
    prior: float = field(default=1.0, validator=validators.gt(0))
    chunk: int = field(default=128, validator=validators.ge(1))
    group: int = field(default=16, validator=validators.ge(1))
    forwards: int = field(default=0, validator=validators.ge(0))
    seconds: float = field(default=0.0, validator=validators.ge(0))

    def __call__(
        self,
        releases: Tensor,  # (R, N, T, D)
        lengths: Tensor,  # (N,)
        returned: Tensor,  # (N, T, D), or logits in HT
        mask: Tensor,  # (N, T)
        task_kind: str,
        head: Head,
        tail: Tail | None = None,
        logits: Tensor | None = None,
        mechanism: Any = None,
        parameters: Any = None,
        tokenizer: Any = None,
        public_texts: Sequence[str] = (),
        generator: torch.Generator | None = None,
        progress: Progress = lambda *_: None,
    ) -> Guess:
        """Return the tokens (N, T) of every example.

        Raises:
            AttackError: The task predicts no tokens, in HBT no tail is granted, the head is not causal, or what the
                proposals are made of is not granted.
        """
        said = said_by_tail(returned, mask, task_kind, tail, logits).to(head.device)
        known = parameters if parameters is not None else mechanism
        plan = VocabularySearch(
            beam=self.beam, prior=self.prior, chunk=self.chunk, group=self.group,
            forwards=self.forwards, seconds=self.seconds,
        )  # fmt: skip
        measure = measure_of(self.matching, known)
        proposals = proposals_of(
            self, measure, head, known, said, tokenizer, public_texts, generator
        )
        make = partial(ReturnedPrior, said)
        return search(releases, lengths, head, measure, plan, make, progress, proposals=proposals)


def said_by_tail(
    returned: Tensor, mask: Tensor, task_kind: str, tail: Tail | None, logits: Tensor | None
) -> Tensor:
    """Return log p of the token after each position: (N, T, V)."""
    if task_kind != "causal-lm":
        raise AttackError(
            f"The tail of a task of kind {task_kind!r} predicts no next token. This attack is for causal-lm."
        )
    if logits is not None:
        return logits.log_softmax(-1)
    if tail is None:
        raise AttackError(
            "In HBT hidden states come back, and no tail is granted to read them with."
        )
    rows = []
    with torch.no_grad():
        for states, real in zip(returned, mask.sum(1).tolist(), strict=True):
            said = tail(states[None, :real].to(tail.device))[0].log_softmax(-1)
            rows.append(torch.nn.functional.pad(said, (0, 0, 0, len(states) - real)))
    return torch.stack(rows)
