"""Gradient matching: soft labels whose gradient at the tail is the one that was sent. Three distances, three papers.

In split learning the states O are known and only the labels are sought, so these are far stronger here than in
federated learning, where the input is sought too; label-enumeration is exact and cheaper, and these are baselines.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from attrs import define, field, frozen, validators
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cosine_similarity

from vflair_attacks.tails import each_example, need_hidden_states
from vflair_core import AttackError, Guess

Progress = Callable[[int, int], None]
Distance = Callable[[Tensor, Tensor], Tensor]  # of two gradients (T, D), a number


@frozen
class DeepLeakage:
    """Match gradients in squared distance (DLG).

    Zhu et al., "Deep Leakage from Gradients", NeurIPS 2019, arXiv 1906.08935. Differs from the paper: the gradient is
    that of hidden states at the local tail, labels are a softmax, and Adam replaces L-BFGS. Every token but the
    first is taken to be a label.

    Attributes:
        iterations: Steps of Adam.
        learning_rate: Of Adam.
    """

    iterations: int = field(default=200, validator=validators.ge(1))
    learning_rate: float = field(default=0.2, validator=validators.gt(0))

    def __call__(
        self,
        returned: Tensor,  # (N, T, D)
        hidden_grad: Tensor,  # (N, T, D)
        lengths: Tensor,  # (N,)
        tail: Any,
        partition: object,
        task_kind: str,
        share: Tensor | None = None,  # (N,)
        progress: Progress = lambda *_: None,
    ) -> Guess:
        """Return tokens (N, T); the first is not seen."""
        rows = _Rows(
            "dlg", returned, hidden_grad, lengths, share, tail, partition, task_kind, progress
        )
        return rows.guess(self, squared)


@frozen
class Tag:
    """Match gradients in squared distance and, weighted, in absolute distance.

    Deng et al., "TAG: Gradient Attack on Transformer-based Language Models", EMNLP Findings 2021, arXiv 2103.06819.
    Differs from the paper as `DeepLeakage` does; one gradient is matched, so there are no weights per layer.

    Attributes:
        absolute: Weight of the absolute distance (the paper's α).
        iterations: Steps of Adam.
        learning_rate: Of Adam.
    """

    absolute: float = field(default=0.1, validator=validators.ge(0))
    iterations: int = field(default=200, validator=validators.ge(1))
    learning_rate: float = field(default=0.2, validator=validators.gt(0))

    def __call__(
        self,
        returned: Tensor,  # (N, T, D)
        hidden_grad: Tensor,  # (N, T, D)
        lengths: Tensor,  # (N,)
        tail: Any,
        partition: object,
        task_kind: str,
        share: Tensor | None = None,  # (N,)
        progress: Progress = lambda *_: None,
    ) -> Guess:
        """Return tokens (N, T); the first is not seen."""

        def distance(made: Tensor, sent: Tensor) -> Tensor:
            return (
                squared(made, sent) + self.absolute * (made - sent).abs().sum() / sent.abs().sum()
            )

        rows = _Rows(
            "tag", returned, hidden_grad, lengths, share, tail, partition, task_kind, progress
        )
        return rows.guess(self, distance)


@frozen
class Lamp:
    """Match gradients in cosine distance, and now and then try other orders of the tokens.

    Balunović et al., "LAMP: Extracting Text from Gradients with Language Model Priors", NeurIPS 2022, arXiv
    2202.08827. Differs from the paper as `DeepLeakage` does; two kinds of proposals (swap two tokens, move one) are scored by
    the distance plus the weighted loss per token, in nats, of the pretrained model, where that is granted.

    Attributes:
        every: Iterations between rounds of proposals.
        proposals: Orders tried in a round.
        prior: Weight of the language model's loss.
        iterations: Steps of Adam.
        learning_rate: Of Adam.
    """

    every: int = field(default=50, validator=validators.ge(1))
    proposals: int = field(default=20, validator=validators.ge(0))
    prior: float = field(default=0.1, validator=validators.ge(0))
    iterations: int = field(default=200, validator=validators.ge(1))
    learning_rate: float = field(default=0.2, validator=validators.gt(0))

    def __call__(
        self,
        returned: Tensor,  # (N, T, D)
        hidden_grad: Tensor,  # (N, T, D)
        lengths: Tensor,  # (N,)
        tail: Any,
        partition: object,
        task_kind: str,
        generator: torch.Generator,
        pretrained_model: Any = None,
        share: Tensor | None = None,  # (N,)
        progress: Progress = lambda *_: None,
    ) -> Guess:
        """Return tokens (N, T); the first is not seen."""
        rows = _Rows(
            "lamp", returned, hidden_grad, lengths, share, tail, partition, task_kind, progress
        )
        return rows.guess(
            self, cosine, lambda match: self._reorder(match, generator, pretrained_model)
        )

    def _reorder(self, match: _Match, generator: torch.Generator, model: Any) -> None:
        """Keep the best of some proposed orders of the soft labels, if it is better than the present one."""
        if match.step % self.every or len(match.soft) < 2:
            return
        best, order = self._score(match, match.soft.detach(), model), None
        for _ in range(self.proposals):
            tried = propose(len(match.soft), generator)
            score = self._score(match, match.soft.detach()[tried], model)
            if score < best:
                best, order = score, tried
        if order is not None:
            match.soft.data = match.soft.data[order]

    def _score(self, match: _Match, soft: Tensor, model: Any) -> float:
        score = float(match.objective(soft).detach())
        if model is not None and self.prior:
            ids = soft.argmax(-1)[None]
            with torch.no_grad():
                score += self.prior * float(model(input_ids=ids, labels=ids).loss)
        return score


def propose(count: int, generator: torch.Generator) -> list[int]:
    """An order of `count` positions in which two are swapped, or one is moved."""
    first, second = torch.randint(count, (2,), generator=generator).tolist()
    order = list(range(count))
    if int(torch.randint(2, (1,), generator=generator)):
        order[first], order[second] = order[second], order[first]
    else:
        order.insert(second, order.pop(first))
    return order


def squared(made: Tensor, sent: Tensor) -> Tensor:
    """Squared distance, as a share of what was sent."""
    return (made - sent).square().sum() / sent.square().sum()


def cosine(made: Tensor, sent: Tensor) -> Tensor:
    """One minus the cosine, averaged over rows that were sent."""
    real = sent.norm(dim=1) > 0
    return 1 - cosine_similarity(made[real], sent[real]).mean()


@define(slots=False)
class _Match:
    """The search for the labels of one text."""

    tail: Any
    states: Tensor  # (1, T, D)
    sent: Tensor  # (T, D)
    distance: Distance
    step: int = 0

    def run(self, plan: Any, between: Callable[[_Match], None]) -> Tensor:
        """Return the labels (T − 1,) after the last step."""
        with torch.no_grad():
            vocabulary = self.tail(self.states).shape[-1]
        shape = self.states.shape[1] - 1, vocabulary
        self.soft = torch.zeros(shape, device=self.states.device, requires_grad=True)
        optimizer = torch.optim.Adam([self.soft], lr=plan.learning_rate)
        for self.step in range(1, plan.iterations + 1):
            optimizer.zero_grad()
            self.objective(self.soft).backward()
            optimizer.step()
            between(self)
        return self.soft.detach().argmax(-1)

    def objective(self, soft: Tensor) -> Tensor:
        """How far the gradient for labels softmax(`soft`) is from the one that was sent."""
        states = self.states.clone().requires_grad_()
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # which can be differentiated twice
            scores = self.tail(states)[0, :-1].log_softmax(-1)
            loss = -(soft.softmax(-1) * scores).sum(-1).mean()
            (made,) = torch.autograd.grad(loss, states, create_graph=True)
        return self.distance(made[0], self.sent)


@frozen(eq=False)
class _Rows:
    """The texts of a run, one after the other."""

    name: str
    returned: Tensor
    hidden_grad: Tensor
    lengths: Tensor
    share: Tensor | None
    tail: Any
    partition: Any
    task_kind: str
    progress: Progress

    def guess(
        self, plan: Any, distance: Distance, between: Callable[[_Match], None] = lambda _: None
    ) -> Guess:
        need_hidden_states(self.partition, self.name)
        if self.task_kind != "causal-lm":
            raise AttackError(
                f"{self.name} seeks the tokens of a causal language model, and this is {self.task_kind}. For classes "
                "use label-enumeration or bli."
            )
        tokens = torch.full(self.returned.shape[:2], -1)
        rows = each_example(self.returned, self.hidden_grad, self.lengths, self.tail)
        for n, (states, sent) in enumerate(rows):
            if self.share is not None:  # the loss of a text alone is differentiated here
                sent = sent / self.share[n]
            if bool(sent.any()):
                labels = _Match(self.tail, states, sent, distance).run(plan, between)
                tokens[n, 1 : len(labels) + 1] = labels
            self.progress(n + 1, len(tokens))
        return Guess(tokens=tokens, budget={"iterations": plan.iterations * len(tokens)})
