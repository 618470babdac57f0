"""Try every label: the one whose gradient points where the gradient points that was sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from attrs import define, field, frozen, validators
from torch import Tensor

from vflair_attacks.tails import (
    Scales,
    class_gradients,
    each_example,
    likeliest,
    need_hidden_states,
    token_gradients,
)
from vflair_core import AttackError, Guess

Progress = Callable[[int, int], None]


@frozen
class LabelEnumeration:
    """Guess argmax_c cos(∂CE(tail(O), c)/∂O, G_O), in HBT training.

    Exhaustive form of the gradient matching of Zou et al., "Defending Batch-Level Label Inference and
    Replacement Attacks in Vertical Federated Learning", IEEE Trans. Big Data 2022, arXiv 2112.05409: one gradient
    per class instead of an optimisation. For causal language models row t of G_O depends on the labels from t on, so
    positions are solved from the last to the first and each solved term is subtracted; a directional
    derivative of the logits chooses which tokens are tried. Who knows the defense of gradients takes the likelihood
    through it instead of the cosine, with the tail's own probabilities as prior.

    Attributes:
        candidates: Tokens tried per position of a language model.
        silent: A row whose remaining gradient is below this share of the largest row carries no label.
    """

    candidates: int = field(default=64, validator=validators.ge(2))
    silent: float = field(default=1e-3, validator=validators.ge(0))

    def __call__(
        self,
        returned: Tensor,  # (N, T, D)
        hidden_grad: Tensor,  # (N, T, D)
        lengths: Tensor,  # (N,)
        tail: Any,
        partition: object,
        task_kind: str,
        gradient_mechanism: Any = None,
        share: Tensor | None = None,  # (N,)
        progress: Progress = lambda *_: None,
    ) -> Guess:
        """Return labels (N,), or for a causal language model tokens (N, T)."""
        need_hidden_states(partition, "label-enumeration")
        rows = each_example(returned, hidden_grad, lengths, tail)
        part = torch.ones(len(lengths)) if share is None else share
        if task_kind == "causal-lm":
            tokens = torch.full(returned.shape[:2], -1)
            spent = 0
            for n, (states, gradient) in enumerate(rows):
                solver = _Backwards(
                    tail, states, gradient, self, gradient_mechanism, float(part[n])
                )
                labels = solver.solve()  # (T,): the label of row t is token t + 1
                tokens[n, 1 : len(labels)] = labels[:-1]
                spent += solver.forwards
                progress(n + 1, len(lengths))
            return Guess(tokens=tokens, budget={"forwards": spent})
        if task_kind != "classification":
            raise AttackError(
                f"label-enumeration tries classes or tokens; a task of kind {task_kind!r} has neither."
            )
        found, spent = [], 0
        for n, (states, gradient) in enumerate(rows):
            each, prior = class_gradients(tail, states)
            scores = likeliest(gradient, part[n] * each, gradient_mechanism, prior)
            found.append(int(scores.argmax()))
            spent += len(each)
            progress(n + 1, len(lengths))
        return Guess(labels=torch.tensor(found), budget={"forwards": spent})


@define(slots=False)
class _Backwards:
    """The labels of one text, last position first.

    `explained` is the gradient of a sum of losses of the solved labels. The loss is a mean over as many labels as there
    are in the batch, of which this text has a `share`, and a defense may have scaled it: all solved rows together say by what `factor`, or, through noise of known
    scale, what is believed of it (`scales`).
    """

    tail: Any
    states: Tensor  # (1, T, D)
    gradient: Tensor  # (T, D)
    plan: LabelEnumeration
    mechanism: Any
    share: float
    forwards: int = 0

    def solve(self) -> Tensor:
        length = len(self.gradient)
        self.explained, self.factor = (
            torch.zeros_like(self.gradient),
            self.share / max(length - 1, 1),
        )
        noisy = self.mechanism is not None and self.mechanism.in_nats
        self.scales = Scales.of(max(length - 1, 1), self.share) if noisy else None
        labels = torch.full((length,), -1)
        floor = self.plan.silent * self.gradient.norm(dim=1).max()
        for position in range(length - 2, -1, -1):  # the last row predicts nothing
            left = self.gradient[position] - self._sent(self.explained[position:])[0]
            if left.norm() > floor:
                labels[position] = self._solve(position, left)
        return labels

    def _sent(self, rows: Tensor) -> Tensor:  # (..., T', D)
        """What would be sent for a sum of losses, as far as the defense is known."""
        made = self.factor * rows
        return made if self.mechanism is None else self.mechanism.expected(made)

    def _solve(self, position: int, left: Tensor) -> int:
        """Find the label of one row and add what it explains of this row and the earlier ones."""
        upto = self.states[:, : position + 1]
        tokens, prior = self._shortlist(upto, left)
        each = token_gradients(self.tail, upto, tokens)  # (K, t, D)
        self.forwards += len(tokens)
        best = int(self._scores(position, left, each[:, -1:], prior).argmax())
        self.explained[: position + 1] += each[best]
        solved = self._sent(self.explained[position:])
        self.factor *= float((self.gradient[position:] * solved).sum() / solved.square().sum())
        return int(tokens[best])

    def _scores(self, position: int, left: Tensor, own: Tensor, prior: Tensor) -> Tensor:
        """Score the tokens whose own gradients of one row are `own`, (K, 1, D): (K,)."""
        if self.mechanism is None:
            return likeliest(left[None], own, None, prior)
        seen, whole = self.gradient[position][None], self.explained[position] + own
        if self.scales is None:
            return likeliest(seen, self.factor * whole, self.mechanism, prior)
        joint = self.scales.joint(seen, whole, self.mechanism, prior)
        self.scales.learn(joint)
        return self.scales.believed(joint)

    def _shortlist(self, upto: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens whose logits fall most when the state moves along what is left, and their log-probabilities."""
        step = torch.zeros_like(upto)
        step[0, -1] = seen * (1e-2 * upto[0, -1].norm() / seen.norm())
        with torch.no_grad():
            ahead, behind = self.tail(upto + step)[0, -1], self.tail(upto - step)[0, -1]
        self.forwards += 2
        slope = ahead - behind  # (V,), of d logits
        said = ((ahead + behind) / 2).log_softmax(-1)
        tokens = slope.topk(min(self.plan.candidates, len(slope)), largest=False).indices
        if self.scales is not None:  # noise may hide the label from the slope
            others = said.topk(len(tokens)).indices, slope.topk(len(tokens)).indices
            tokens = torch.cat([tokens, *others]).unique()  # or turn it round
        return tokens, said[tokens]
