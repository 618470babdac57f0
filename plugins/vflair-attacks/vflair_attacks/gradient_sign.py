"""Read labels off the gradient that the data party sends in HT training."""

from __future__ import annotations

from typing import Any

import torch
from attrs import field, frozen, validators
from torch import Tensor
from torch.nn.functional import one_hot

from vflair_attacks.tails import Scales, likeliest
from vflair_core import AttackError, Guess


@frozen
class GradientSign:
    """dL/dlogits is softmax − one-hot: its one negative coordinate is the label. No weights are needed.

    iDLG (Zhao et al., arXiv 2001.02610) for the last layer's gradient; here it crosses as it is. For causal
    language models the label of row t is token t + 1, so the text follows; the first token is not seen.
    Rows whose gradient is zero carry no label and are left out. Who knows the defense of gradients, and sees the logits,
    takes the likeliest label through it, with the model's own probabilities as prior, over all factors by which a mean of
    losses or a clip may have scaled an example's gradient.

    Attributes:
        candidates: Labels of a row that are tried through a known defense.
    """

    candidates: int = field(default=64, validator=validators.ge(2))

    def __call__(
        self,
        hidden_grad: Tensor,  # (N, T, V), or (N, C)
        lengths: Tensor,  # (N,)
        partition: object,
        task_kind: str,
        logits: Tensor | None = None,  # as hidden_grad
        gradient_mechanism: Any = None,
        share: Tensor | None = None,  # (N,)
    ) -> Guess:
        """Return labels (N,), or for a causal language model tokens (N, T)."""
        if getattr(partition, "kind", "") != "HT":
            raise AttackError(
                "In HBT the gradient that crosses is of hidden states, not of logits, so it has no label "
                "sign. Use HT (tail = 0) or another label attack."
            )
        if gradient_mechanism is not None and logits is not None:
            if (
                task_kind != "causal-lm" and logits.dim() > 2
            ):  # a decoder: its last token's row has the gradient
                rows = torch.arange(len(logits)), lengths - 1
                hidden_grad, logits = hidden_grad[rows], logits[rows]
            part = torch.ones(len(logits)) if share is None else share
            found = self._adaptive(hidden_grad, logits, gradient_mechanism, part)
        else:
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

    def _adaptive(self, sent: Tensor, logits: Tensor, mechanism: Any, share: Tensor) -> Tensor:
        """The likeliest labels of all examples: (N, T) or (N,)."""
        classes = sent.shape[-1]
        triples = zip(
            sent.view(len(sent), -1, classes),
            logits.view(len(sent), -1, classes),
            share.tolist(),
            strict=True,
        )
        found = [self._through(*triple, mechanism) for triple in triples]
        return torch.stack(found).view(sent.shape[:-1])

    def _through(self, sent: Tensor, logits: Tensor, share: float, mechanism: Any) -> Tensor:
        """The likeliest label of each row of an example: (T, C), (T, C) -> (T,)."""
        chances = logits.softmax(-1)
        classes = chances.shape[-1]
        told = chances - one_hot(sent.argmin(-1), classes)
        factor = (sent * told).sum() / told.square().sum()  # what the first guess says of the scale
        count = min(self.candidates, classes)
        shortlist = (sent - factor * chances).topk(count, largest=False).indices  # (T, K)
        if mechanism.in_nats and count < classes:  # noise may hide the label from the gradient
            likely, largest = chances.topk(count).indices, sent.topk(count).indices
            shortlist = torch.cat([shortlist, likely, largest], dim=1)  # or turn it round
        scales = Scales.of(len(sent), share) if mechanism.in_nats else None
        joints = []
        tries = [tried.unique() for tried in shortlist]
        for row, chance, tried in zip(sent, chances, tries, strict=True):
            guesses = (chance - one_hot(tried, classes))[:, None]  # (K, 1, C)
            prior = chance[tried].clamp_min(1e-30).log()
            if scales is None:
                joints.append(likeliest(row[None], factor * guesses, mechanism, prior))
                continue
            joints.append(scales.joint(row[None], guesses, mechanism, prior))
            scales.learn(joints[-1])
        scores = joints if scales is None else [scales.believed(joint) for joint in joints]
        best = [tried[score.argmax()] for tried, score in zip(tries, scores, strict=True)]
        return torch.stack(best)
