"""Rank examples by the size of their gradient, where rare labels stand out."""

from __future__ import annotations

from attrs import field, frozen, validators
from torch import Tensor

from vflair_attacks.clusters import two_means
from vflair_core import Guess


@frozen
class NormScoring:
    """Score each example by ‖G_O‖ over its positions: a rare class is believed less, so its gradient is larger.

    Li et al., "Label Leakage and Protection in Two-party Split Learning", ICLR 2022, arXiv 2102.08504.
    Differs from the paper: the norm runs over all tokens of an example; with more than two classes one stands against
    the rest. Which class is the large one is said beforehand, so the grade cannot flatter the attack; it holds
    early in training only, and reverses later.

    Attributes:
        positive: The class that is taken for the rare one.
        negative: The class guessed for everyone else.
    """

    positive: int = field(default=1, validator=validators.ge(0))
    negative: int = field(default=0, validator=validators.ge(0))

    def __call__(self, hidden_grad: Tensor) -> Guess:  # (N, T, D), or (N, C) in HT
        """Return scores (N,), and labels (N,) by the two clusters of the scores."""
        scores = hidden_grad.flatten(1).norm(dim=1)  # padding is zero
        labels = two_means(scores).long() * (self.positive - self.negative) + self.negative
        return Guess(scores=scores, labels=labels, positive=self.positive)
