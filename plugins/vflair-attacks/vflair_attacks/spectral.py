"""Split the examples along the direction in which their gradients, or their states, vary most."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from attrs import field, frozen, validators
from torch import Tensor

from vflair_attacks.clusters import two_means
from vflair_core import AttackError, Guess


@frozen
class Spectral:
    """Project the centred messages on their first right singular vector, and cut the projections in two.

    Sun et al., "Label Leakage and Protection from Forward Embedding in Vertical Federated Learning",
    arXiv 2203.01451. It also works on forward states, which a defense of gradients does not touch.
    Differs from the paper: tokens are summed (gradients) or averaged (states). A singular vector has no sign: known labels
    give it one, and without any the smaller cluster is taken for the positive class, a rule fixed beforehand.

    Attributes:
        on: What is projected: hidden_grad, returned or smashed.
        positive: The class that scores speak of, taken for the rarer one.
        negative: The other class.
    """

    on: Literal["hidden_grad", "returned", "smashed"] = "hidden_grad"
    positive: int = field(default=1, validator=validators.ge(0))
    negative: int = field(default=0, validator=validators.ge(0))

    def __call__(
        self,
        lengths: Tensor,  # (N,)
        hidden_grad: Tensor | None = None,  # (N, T, D)
        returned: Tensor | None = None,  # (N, T, D)
        smashed: Tensor | None = None,  # (N, T, D)
        known_labels: Mapping[int, int] | None = None,
    ) -> Guess:
        """Return scores (N,) and labels (N,)."""
        given = {"hidden_grad": hidden_grad, "returned": returned, "smashed": smashed}[self.on]
        if given is None:
            raise AttackError(
                f"spectral works on {self.on}, which did not cross or is not granted. "
                'Gradients need victims.phase = "train".'
            )
        rows = given.sum(1) if given.dim() == 3 else given
        if self.on != "hidden_grad" and given.dim() == 3:
            rows = rows / lengths[:, None]
        centred = rows - rows.mean(0)
        direction = torch.linalg.svd(centred, full_matrices=False).Vh[0]
        scores = centred @ direction  # (N,)
        upper = two_means(scores)
        if self._is_reversed(scores, upper, known_labels or {}):
            scores, upper = -scores, ~upper
        labels = torch.where(upper, self.positive, self.negative)
        return Guess(scores=scores, labels=labels, positive=self.positive)

    def _is_reversed(self, scores: Tensor, upper: Tensor, known: Mapping[int, int]) -> bool:
        ours = [float(scores[n]) for n, label in known.items() if label == self.positive]
        others = [float(scores[n]) for n, label in known.items() if label != self.positive]
        middle = float(scores[upper].min() + scores[~upper].max()) / 2
        if ours:
            return sum(ours) / len(ours) < middle
        if others:
            return sum(others) / len(others) > middle
        return int(upper.sum()) > len(upper) / 2
