"""Compare the direction of each gradient with that of examples whose label is known."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from attrs import field, frozen, validators
from torch import Tensor
from torch.nn.functional import normalize

from vflair_core import AttackError, Guess


@frozen
class DirectionScoring:
    """Score each example by its largest cosine with the gradient of an example of the positive class.

    Li et al., "Label Leakage and Protection in Two-party Split Learning", ICLR 2022, arXiv 2102.08504.
    Differs from the paper: gradients are summed over tokens; where several classes are known, each example gets the
    class of the nearest one, else the positive class where the cosine is above zero.

    Attributes:
        positive: The class that scores speak of; one example of it must be known.
        negative: The class guessed for everyone else, if no example of another class is known.
    """

    positive: int = field(default=1, validator=validators.ge(0))
    negative: int = field(default=0, validator=validators.ge(0))

    def __call__(
        self,
        hidden_grad: Tensor,  # (N, T, D), or (N, C) in HT
        known_labels: Mapping[int, int],
    ) -> Guess:
        """Return scores (N,) in [-1, 1] and labels (N,)."""
        if self.positive not in known_labels.values():
            raise AttackError(
                f"direction-scoring needs one example of class {self.positive} whose label is known; known are "
                f"{sorted(set(known_labels.values()))}. Raise victims.known or choose another positive class."
            )
        summed = hidden_grad.sum(1) if hidden_grad.dim() == 3 else hidden_grad  # (N, D)
        directions = normalize(summed, dim=1)
        classes = sorted(set(known_labels.values()))
        nearest = torch.stack(
            [
                (directions @ directions[[n for n, label in known_labels.items() if label == c]].T)
                .max(1)
                .values
                for c in classes
            ],
            dim=1,
        )  # (N, classes known)
        scores = nearest[:, classes.index(self.positive)]
        if len(classes) > 1:
            labels = torch.tensor(classes)[nearest.argmax(1)]
        else:
            labels = torch.where(scores > 0, self.positive, self.negative)
        return Guess(scores=scores, labels=labels, positive=self.positive)
