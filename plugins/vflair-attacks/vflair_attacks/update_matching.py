"""Gradient matching on parameter updates: soft text for which the data party's weights get the gradient that was shared.

As in the papers, nothing is known of the text: it is sought through the whole model. Head and tail are those that are granted, the
body is the attacker's own. Where it applies dager is exact and far cheaper; these go on where its spans are full.

The gradient of the token table is left out: without input tokens there is none to match, and it gives the bag of tokens
away by itself, as the rows that are not zero (where the output layer does not share the table). `bag` takes that in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from attrs import field, frozen, validators
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vflair_attacks.descent import Progress
from vflair_attacks.gradient_matching import propose
from vflair_attacks.update_search import Gradients, Match, Model, search
from vflair_core import Guess, Head, Tail


@frozen
class DeepLeakageOfUpdates:
    """Match shared updates in squared distance (DLG).

    Zhu et al., "Deep Leakage from Gradients", NeurIPS 2019, arXiv 1906.08935. Differs from the paper: text is a softmax over the
    vocabulary, and one and the same is embedded and, shifted, the label; Adam replaces L-BFGS; the gradient of
    the token table is left out. Every token but the first is taken to be a label, and dropout to be off.

    Attributes:
        iterations: Steps of Adam.
        learning_rate: Of Adam.
        bag: Choose among tokens whose row of the token table has a gradient, as LAMP's code can.
    """

    iterations: int = field(default=300, validator=validators.ge(1))
    learning_rate: float = field(default=0.1, validator=validators.gt(0))
    bag: bool = False

    def __call__(
        self,
        updates: Sequence[Mapping[str, Tensor]],
        lengths: Tensor,  # (N,)
        head: Head,
        body: torch.nn.Module,
        task_kind: str,
        generator: torch.Generator,
        tail: Tail | None = None,
        progress: Progress = lambda *_: None,
    ) -> Guess:
        """Return tokens (N, T), those of one update in no order."""
        model = Model("dlg-updates", head, body, tail, task_kind)
        return search(self, model, updates, lengths, generator, squared, progress)


@frozen
class TagOfUpdates:
    """Match shared updates in squared distance and, weighted, in absolute distance.

    Deng et al., "TAG: Gradient Attack on Transformer-based Language Models", EMNLP Findings 2021, arXiv 2103.06819.
    Differs from the paper as `DeepLeakageOfUpdates` does, and has one weight for all layers.

    Attributes:
        absolute: Weight of the absolute distance (the paper's α).
        iterations: Steps of Adam.
        learning_rate: Of Adam.
        bag: Choose among tokens whose row of the token table has a gradient.
    """

    absolute: float = field(default=0.1, validator=validators.ge(0))
    iterations: int = field(default=300, validator=validators.ge(1))
    learning_rate: float = field(default=0.1, validator=validators.gt(0))
    bag: bool = False

    def __call__(
        self,
        updates: Sequence[Mapping[str, Tensor]],
        lengths: Tensor,  # (N,)
        head: Head,
        body: torch.nn.Module,
        task_kind: str,
        generator: torch.Generator,
        tail: Tail | None = None,
        progress: Progress = lambda *_: None,
    ) -> Guess:
        """Return tokens (N, T), those of one update in no order."""

        def distance(made: Gradients, sent: Gradients) -> Tensor:
            return squared(made, sent) + self.absolute * absolute(made, sent)

        model = Model("tag-updates", head, body, tail, task_kind)
        return search(self, model, updates, lengths, generator, distance, progress)


@frozen
class LampOfUpdates:
    """Match shared updates in cosine distance, and now and then try other orders of the tokens.

    Balunović et al., "LAMP: Extracting Text from Gradients with Language Model Priors", NeurIPS 2022, arXiv 2202.08827.
    Differs from the paper as `DeepLeakageOfUpdates` does; two kinds of proposals (swap two tokens of a text, move one) are
    scored by the distance plus the weighted loss per token, in nats, of the pretrained model, where that is granted.

    Attributes:
        every: Iterations between rounds of proposals.
        proposals: Orders tried in a round.
        prior: Weight of the language model's loss.
        iterations: Steps of Adam.
        learning_rate: Of Adam.
        bag: Choose among tokens whose row of the token table has a gradient.
    """

    every: int = field(default=50, validator=validators.ge(1))
    proposals: int = field(default=20, validator=validators.ge(0))
    prior: float = field(default=0.1, validator=validators.ge(0))
    iterations: int = field(default=300, validator=validators.ge(1))
    learning_rate: float = field(default=0.1, validator=validators.gt(0))
    bag: bool = False

    def __call__(
        self,
        updates: Sequence[Mapping[str, Tensor]],
        lengths: Tensor,  # (N,)
        head: Head,
        body: torch.nn.Module,
        task_kind: str,
        generator: torch.Generator,
        tail: Tail | None = None,
        pretrained_model: Any = None,
        progress: Progress = lambda *_: None,
    ) -> Guess:
        """Return tokens (N, T), those of one update in no order."""

        def between(match: Match, step: int) -> None:
            if step % self.every == 0:
                reorder(match, self, generator, pretrained_model)

        model = Model("lamp-updates", head, body, tail, task_kind)
        return search(self, model, updates, lengths, generator, cosine, progress, between)


def squared(made: Gradients, sent: Gradients) -> Tensor:
    """Squared distance over all weights, as a share of what was sent."""
    pairs = list(zip(made, sent, strict=True))
    return torch.stack([(a - b).square().sum() for a, b in pairs]).sum() / sum(
        b.square().sum() for b in sent
    )


def absolute(made: Gradients, sent: Gradients) -> Tensor:
    """Absolute distance over all weights, as a share of what was sent."""
    pairs = list(zip(made, sent, strict=True))
    return torch.stack([(a - b).abs().sum() for a, b in pairs]).sum() / sum(
        b.abs().sum() for b in sent
    )


def cosine(made: Gradients, sent: Gradients) -> Tensor:
    """One minus the cosine of each weight's gradient, averaged over weights."""
    pairs = zip(made, sent, strict=True)
    return (
        1 - torch.stack([cosine_similarity(a.flatten(), b.flatten(), 0) for a, b in pairs]).mean()
    )


def reorder(match: Match, plan: LampOfUpdates, generator: torch.Generator, prior: Any) -> None:
    """Keep the best of some proposed orders of one text's tokens each, if it is better than what is there."""
    best, chosen = _score(match, match.soft.detach(), plan.prior, prior), None
    for _ in range(plan.proposals):
        row = int(torch.randint(len(match.mask), (1,), generator=generator))
        tried = match.soft.detach().clone()
        length = int(match.mask[row].sum())
        tried[row, :length] = tried[row, propose(length, generator)]
        score = _score(match, tried, plan.prior, prior)
        if score < best:
            best, chosen = score, tried
    if chosen is not None:
        match.soft.data = chosen


def _score(match: Match, soft: Tensor, weight: float, prior: Any) -> float:
    score = float(match.objective(soft).detach())
    if prior is not None and weight:
        ids = match.text(soft).argmax(-1)
        labels = ids.masked_fill(~match.mask, -100)
        with torch.no_grad():
            loss = prior(input_ids=ids, attention_mask=match.mask.long(), labels=labels).loss
        score += weight * float(loss)
    return score
