"""Through noise of known scale an attack on labels is never worse than its prior, and nearly as good as can be.

The witness is the posterior by hand, with the factor on the gradient known: nobody who has to infer it does better.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import one_hot

from vflair_attacks.gradient_sign import GradientSign
from vflair_attacks.label_enumeration import LabelEnumeration
from vflair_core import Partition
from vflair_core.defenses.mechanism import Mechanism

NOISES = (0.01, 0.05, 0.2, 1.0)
EXAMPLES, LENGTH, WIDTH, VOCABULARY = 30, 12, 16, 100
FACTOR = 1 / (LENGTH - 1)


class Normal(Mechanism):
    in_nats = True

    def __init__(self, sigma):
        self.sigma = sigma

    def log_likelihood(self, observed, hidden):
        return -(observed - hidden).square().sum(-1) / (2 * self.sigma**2)


class Linear:
    """A tail of one matrix (D, V)."""

    device = torch.device("cpu")

    def __init__(self, output):
        self.output = output

    def __call__(self, states):
        return states @ self.output


def drawn(logits):
    """Labels from the model's own probabilities, and how often the likeliest one is right."""
    torch.manual_seed(1)
    labels = torch.distributions.Categorical(logits=logits).sample()
    return labels, right(logits.argmax(-1), labels)


def right(found, labels):
    return float((found == labels)[:, :-1].float().mean())


def posterior(sent, gradients, logits, sigma):
    """The likeliest label of each row, the gradient (…, V, D) of each label and the factor known."""
    apart = (sent[..., None, :] - FACTOR * gradients).square().sum(-1)
    return (logits.log_softmax(-1) - apart / (2 * sigma**2)).argmax(-1)


def noisy(gradient, sigma):
    gradient[:, -1] = 0  # the last row has no label
    torch.manual_seed(2)
    return gradient + sigma * torch.randn_like(gradient)


@pytest.mark.parametrize("sigma", NOISES)
def test_of_logits(sigma):
    torch.manual_seed(0)
    logits = 2.5 * torch.randn(EXAMPLES, LENGTH, VOCABULARY)
    labels, prior = drawn(logits)
    chances = logits.softmax(-1)
    sent = noisy(FACTOR * (chances - one_hot(labels, VOCABULARY)), sigma)
    lengths = torch.full((EXAMPLES,), LENGTH)
    guess = GradientSign(candidates=16)(
        sent, lengths, Partition(1, 0), "causal-lm", logits, Normal(sigma)
    )
    found = right(guess.tokens.roll(-1, 1), labels)
    best = posterior(sent, chances[..., None, :] - torch.eye(VOCABULARY), logits, sigma)
    assert found > prior - 0.03
    assert found > right(best, labels) - 0.06


@pytest.mark.parametrize("sigma", NOISES)
def test_of_hidden_states(sigma):
    torch.manual_seed(0)
    output = 0.8 * torch.randn(WIDTH, VOCABULARY)
    states = torch.randn(EXAMPLES, LENGTH, WIDTH)
    logits = states @ output
    labels, prior = drawn(logits)
    chances = logits.softmax(-1)
    sent = noisy(FACTOR * (chances - one_hot(labels, VOCABULARY)) @ output.T, sigma)
    lengths = torch.full((EXAMPLES,), LENGTH)
    guess = LabelEnumeration(candidates=16)(
        states, sent, lengths, Linear(output), Partition(1, 1), "causal-lm", Normal(sigma)
    )
    found = right(guess.tokens.roll(-1, 1), labels)
    each = (chances[..., None, :] - torch.eye(VOCABULARY)) @ output.T
    best = posterior(sent, each, logits, sigma)
    assert found > prior - 0.03
    assert found > right(best, labels) - 0.06
