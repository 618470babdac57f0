"""What the attacks on labels share: the gradient that the local tail would send for a label it was given."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from attrs import define
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy

from vflair_core import AttackError


def each_example(
    returned: Tensor, hidden_grad: Tensor, lengths: Tensor, tail: Any
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield what came back, (1, T, D), and the gradient that was sent, (T, D), of each example, unpadded, at the tail."""
    for row, gradient, length in zip(returned, hidden_grad, lengths.tolist(), strict=True):
        yield row[None, :length].detach().to(tail.device), gradient[:length].to(tail.device)


def need_hidden_states(partition: Any, attack: str) -> None:
    """Refuse HT, where the gradient is of logits and shows the label by itself.

    Raises:
        AttackError: The partition is HT.
    """
    if partition.kind == "HT":
        raise AttackError(
            f"{attack} matches the gradient of hidden states, which crosses in HBT only. In HT the gradient of "
            "the logits crosses: use gradient-sign."
        )


def class_gradients(tail: Any, states: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return ∂CE(tail(O), c)/∂O for each class c, (C, T, D), and the tail's log-probabilities, (C,).

    `states` are O of one example, (1, T, D). The loss is linear in the label, so the gradient for a label
    distribution q is Σ_c q_c times that for c.
    """
    with torch.no_grad():
        scores = tail(states, attention_mask=mask)[0]
    if scores.dim() != 1:
        raise AttackError(
            "The tail gives logits at every position, so there is no one class per example."
        )
    classes = len(scores)
    copies = states.expand(classes, -1, -1).clone().requires_grad_()
    wide = None if mask is None else mask.expand(classes, -1)
    labels = torch.arange(classes, device=states.device)
    loss = cross_entropy(tail(copies, attention_mask=wide), labels, reduction="sum")
    (gradients,) = torch.autograd.grad(loss, copies)
    return gradients, scores.log_softmax(-1)


def likeliest(observed: Tensor, guesses: Tensor, mechanism: Any, prior: Tensor) -> Tensor:
    """Score the gradients (K, T, D) that K guesses would give against the one that was sent, (T, D): (K,).

    Who does not know the defense of gradients compares directions; who does takes the likelihood through it and, where that is
    in nats, adds the guesses' `prior` log-probabilities (K,).
    """
    if mechanism is None:
        return cosine_similarity(guesses.flatten(1), observed.flatten()[None])
    explained = mechanism.log_likelihood(observed[None], guesses).sum(-1)  # (K,)
    return explained + prior if mechanism.in_nats else explained


@define
class Scales:
    """What is believed of the factor on an example's gradient: the loss is a mean, and a clip may have shortened it.

    The factor lies between 1 and a fiftieth of what a mean over the rows of the batch gives, evenly in its logarithm; each row that is seen
    weighs the values by what it is likely at, whatever its label. To fit the factor to a first guess of labels
    instead would fit it to the noise, and be surer than the prior without a reason.
    """

    values: Tensor  # (J,)
    weights: Tensor  # (J,), in nats

    @classmethod
    def of(cls, rows: int, share: float = 1.0, steps: int = 24) -> Scales:
        """Begin with all alike; of an example of one row the factor is its `share` of the loss."""
        if rows == 1:
            return cls(torch.tensor([share]), torch.zeros(1))
        lowest = math.log(share / (50 * rows))
        return cls(torch.linspace(lowest, 0, steps).exp(), torch.zeros(steps))

    def joint(self, row: Tensor, guesses: Tensor, mechanism: Any, prior: Tensor) -> Tensor:
        """Score K guesses about a row, (K, 1, D), at each factor, against what was sent, (1, D): (J, K)."""
        each = [likeliest(row, value * guesses, mechanism, prior) for value in self.values]
        return torch.stack(each).to(self.weights.device)

    def learn(self, joint: Tensor) -> None:
        """Weigh the factors by a row."""
        self.weights = self.weights + joint.logsumexp(1)

    def believed(self, joint: Tensor) -> Tensor:
        """Score K guesses about a row that was learnt from, over all factors: (J, K) -> (K,)."""
        return (self.weights[:, None] + joint.log_softmax(1)).logsumexp(0)


def token_gradients(tail: Any, states: Tensor, tokens: Tensor) -> Tensor:
    """Return ∂CE(tail(O) at the last position, v)/∂O for each of `tokens` (K,): (K, T, D)."""
    copies = states.expand(len(tokens), -1, -1).clone().requires_grad_()
    loss = cross_entropy(tail(copies)[:, -1], tokens, reduction="sum")
    (gradients,) = torch.autograd.grad(loss, copies)
    return gradients
