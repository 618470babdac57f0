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
    give it one; without any the longer tail is taken for the positive class, which is
    right if that class is the rarer one: a rule fixed beforehand.

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
        if self._is_reversed(scores, known_labels or {}):
            scores, upper = -scores, ~upper
        labels = torch.where(upper, self.positive, self.negative)
        return Guess(scores=scores, labels=labels, positive=self.positive)

    def _is_reversed(self, scores: Tensor, known: Mapping[int, int]) -> bool:
        """Whether known examples lie on the wrong side of the mean, or without any the longer tail does."""
        side = sum(float(scores[n]) * (1 if c == self.positive else -1) for n, c in known.items())
        return side < 0 if known else float(scores.pow(3).sum()) < 0
