"""Tell the prompt from the answer by which rows of the gradient are zero."""

from __future__ import annotations

import torch
from attrs import field, frozen, validators
from torch import Tensor

from vflair_core import AttackError, Guess


@frozen
class ZeroRows:
    """A position whose label is left out of the loss sends a gradient of zero, so the next one is no answer.

    arXiv 2609.04382 reads the same pattern off decoy rows. With a tail of norm and output layer, and in HT, the
    pattern is exact; blocks of the tail let earlier rows have a gradient too, since later ones
    attend to them: then all rows up to the last label look alike, and nothing separates prompt and answer.

    Attributes:
        relative: A row below this share of the example's largest row counts as zero.
    """

    relative: float = field(default=1e-6, validator=validators.ge(0))

    def __call__(self, hidden_grad: Tensor, mask: Tensor, task_kind: str) -> Guess:
        """Return which positions (N, T) hold an answer."""
        if hidden_grad.dim() != 3 or task_kind == "classification":
            raise AttackError(
                f"zero-rows looks for rows without a label, and a task of kind {task_kind!r} has one label per "
                "example."
            )
        size = hidden_grad.norm(dim=2)  # (N, T)
        learns = size > self.relative * size.amax(1, keepdim=True)
        answers = torch.zeros_like(learns)
        answers[:, 1:] = learns[:, :-1]  # the label of row t is token t + 1
        return Guess(answers=answers & mask)
