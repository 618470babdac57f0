"""The search for text behind a shared update: the whole model put together, and soft text that descends through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from attrs import define, frozen
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence

from vflair_attacks.descent import Progress
from vflair_core import AttackError, Guess, Head, Tail

Gradients = Sequence[Tensor]
Distance = Callable[[Gradients, Gradients], Tensor]


@frozen(eq=False)
class Model:
    """The whole model, put together by an attacker who holds the body."""

    attack: str
    head: Head
    body: torch.nn.Module
    tail: Tail | None
    task_kind: str

    def check(self) -> None:
        """See that the model can be run from one end to the other.

        Raises:
            AttackError: The task predicts no tokens, or the tail of an HBT partition is not granted, or is another time's.
        """
        if self.task_kind != "causal-lm":
            raise AttackError(
                f"{self.attack} seeks the tokens of a causal language model, and this is {self.task_kind}. For "
                "labels from updates use label-least-squares."
            )
        if self.tail is None and self.head.partition.tail:
            raise AttackError(
                f"{self.attack} runs the whole model, and no tail is granted: its loss is computed there. Grant K2 or "
                "K3, or a tail by name."
            )
        if self.tail is not None and not self.tail.is_of(self.head):
            raise AttackError(
                f"{self.attack} needs head and tail of one time. Grant both as they are (K3), or both as they were "
                "before private fine-tuning (K2)."
            )

    def scores(self, embeds: Tensor, mask: Tensor) -> Tensor:
        """Return the logits (B, T, V) for embeddings (B, T, D)."""
        came = self.head.returned(self.body, inputs_embeds=embeds, attention_mask=mask)
        return came if self.tail is None else self.tail(came, attention_mask=mask)

    def held(self, update: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The weights that the attacker holds and the update has the gradient of, without the token table.

        Raises:
            AttackError: There are none.
        """
        table, named = self.head.embeddings, self.head.named_parameters()
        there = {n: w for n, w in named if n in update and w is not table}
        used = {n: w for n, w in there.items() if bool(update[n].any())}
        if not used:
            raise AttackError(
                f"{self.attack} matches the gradients of weights in the head or the tail, other than the token table. "
                f"The updates hold {', '.join(update) or 'nothing'}. Adapters are merged in what an attacker is "
                "given: use dager for those."
            )
        return used

    @contextmanager
    def differentiable(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """While this lasts, gradients of `weights` can be taken, and differentiated again."""
        try:
            for weight in weights.values():
                weight.requires_grad_(True)
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
                yield
        finally:
            for weight in weights.values():
                weight.requires_grad_(False)


@define(slots=False)
class Match:
    """The search for the texts of one update: `soft` (B, T, V) are scores of tokens, those of each text a softmax."""

    model: Model
    sent: dict[str, Tensor]
    weights: Mapping[str, Tensor]
    mask: Tensor  # (B, T)
    distance: Distance
    soft: Tensor
    among: Tensor  # (V,) bool, the tokens to choose from

    def text(self, soft: Tensor) -> Tensor:
        """The probabilities of tokens, (B, T, V)."""
        return soft.masked_fill(~self.among, -torch.inf).softmax(-1)

    def objective(self, soft: Tensor) -> Tensor:
        """How far the update for this text is from the one that was shared; nothing is learnt from padding."""
        text = self.text(soft)
        scores = self.model.scores(text @ self.model.head.vectors(), self.mask.long())
        losses = -(text[:, 1:] * scores[:, :-1].log_softmax(-1)).sum(-1)  # (B, T − 1)
        loss = losses[self.mask[:, 1:]].mean()
        made = torch.autograd.grad(loss, list(self.weights.values()), create_graph=True)
        return self.distance(made, list(self.sent.values()))

    def tokens(self) -> Tensor:
        """The likeliest tokens, (B, T); -1 on padding."""
        return self.text(self.soft.detach()).argmax(-1).masked_fill(~self.mask, -1)


def search(
    plan: Any,
    model: Model,
    updates: Sequence[Mapping[str, Tensor]],
    lengths: Tensor,
    generator: torch.Generator,
    distance: Distance,
    progress: Progress,
    between: Callable[[Match, int], None] = lambda *_: None,
) -> Guess:
    """Seek the texts of one update after the other by Adam, from scores near zero."""
    model.check()
    size = len(lengths) // len(updates)
    tokens = torch.full((len(lengths), int(lengths.max())), -1)
    total = plan.iterations * len(updates)
    for n, (update, several) in enumerate(zip(updates, lengths.split(size), strict=True)):
        match = _begin(plan, model, update, several, generator, distance)
        optimizer = torch.optim.Adam([match.soft], lr=plan.learning_rate)
        with model.differentiable(match.weights):
            for step in range(1, plan.iterations + 1):
                far = match.objective(match.soft)
                (match.soft.grad,) = torch.autograd.grad(far, match.soft)
                optimizer.step()
                between(match, step)
                if step % 50 == 0 or step == plan.iterations:
                    found = match.tokens().cpu()
                    tokens[n * size : (n + 1) * size, : found.shape[1]] = found
                    progress(n * plan.iterations + step, total, float(far.detach()), tokens)
    return Guess(tokens=tokens, budget={"iterations": total})


def _begin(
    plan: Any,
    model: Model,
    update: Mapping[str, Tensor],
    lengths: Tensor,
    generator: torch.Generator,
    distance: Distance,
) -> Match:
    device, weights = model.head.device, model.held(update)
    mask = pad_sequence(
        [torch.ones(n, dtype=torch.bool) for n in lengths.tolist()], batch_first=True
    )
    among = torch.ones(len(model.head.embeddings), dtype=torch.bool)
    if plan.bag:
        among = _bag(model, update)
    # With scores of zero all positions are alike, and rotary ones stay so.
    drawn = 0.1 * torch.randn((*mask.shape, len(among)), generator=generator)
    return Match(
        model,
        {name: update[name].to(device) for name in weights},
        weights,
        mask.to(device),
        distance,
        drawn.to(device).requires_grad_(),
        among.to(device),
    )


def _bag(model: Model, update: Mapping[str, Tensor]) -> Tensor:
    """The tokens whose row of the token table has a gradient: (V,) bool."""
    table = model.head.embeddings
    named = model.head.named_parameters()
    name = next((n for n, weight in named if weight is table), "")
    if name not in update:
        raise AttackError(
            f"{model.attack} takes the bag of tokens from the gradient of the token table, {name}, which is not among "
            "the updates. Train it (train.trainable), or leave bag = true out."
        )
    return update[name].cpu().abs().sum(-1) > 0
