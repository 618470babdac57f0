"""Read labels off the gradient that the data party sends in HT training."""

from __future__ import annotations

import torch
from attrs import frozen
from torch import Tensor

from vflair_core import AttackError, Guess


@frozen
class GradientSign:
    """dL/dlogits is softmax − one-hot: its one negative coordinate is the label. No weights are needed.

    iDLG (Zhao et al., arXiv 2001.02610) for the last layer's gradient; here it crosses as it is. For causal
    language models the label of row t is token t + 1, so the text follows; the first token is not seen.
    Rows whose gradient is zero carry no label and are left out.
    """

    def __call__(
        self, hidden_grad: Tensor, lengths: Tensor, partition: object, task_kind: str
    ) -> Guess:
        if getattr(partition, "kind", "") != "HT":
            raise AttackError(
                "In HBT the gradient that crosses is of hidden states, not of logits, so it has no label "
                "sign. Use HT (tail = 0) or another label attack."
            )
        found = hidden_grad.argmin(-1)  # (N, T) or (N,)
        size = hidden_grad.abs().amax(-1)
        if task_kind == "causal-lm":
            tokens = torch.full_like(found, -1)
            tokens[:, 1:] = torch.where(size > 0, found, -1)[:, :-1]
            real = torch.arange(found.shape[1])[None] < lengths[:, None]
            return Guess(tokens=torch.where(real, tokens, -1))
        if found.dim() > 1:  # decoder classifiers: only the row of the last token has a gradient
            found = found.gather(1, size.argmax(1, keepdim=True)).squeeze(1)
        return Guess(labels=found)
