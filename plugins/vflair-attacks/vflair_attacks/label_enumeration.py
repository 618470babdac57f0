"""Try every label: the one whose gradient points where the gradient points that was sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from attrs import define, field, frozen, validators
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vflair_attacks.tails import class_gradients, each_example, need_hidden_states, token_gradients
from vflair_core import AttackError, Guess

Progress = Callable[[int, int], None]


@frozen
class LabelEnumeration:
    """Guess argmax_c cos(∂CE(tail(O), c)/∂O, G_O), in HBT training.

    Exhaustive form of the gradient matching of Zou et al., "Defending Batch-Level Label Inference and
    Replacement Attacks in Vertical Federated Learning", IEEE Trans. Big Data 2022, arXiv 2112.05409: one gradient
    per class instead of an optimisation. For causal language models row t of G_O depends on the labels from t on, so
    positions are solved from the last to the first and each solved term is subtracted; a directional
    derivative of the logits chooses which tokens are tried.

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
        progress: Progress = lambda *_: None,
    ) -> Guess:
        """Return labels (N,), or for a causal language model tokens (N, T)."""
        need_hidden_states(partition, "label-enumeration")
        rows = each_example(returned, hidden_grad, lengths)
        if task_kind == "causal-lm":
            tokens = torch.full(returned.shape[:2], -1)
            spent = 0
            for n, (states, gradient) in enumerate(rows):
                solver = _Backwards(tail, states, gradient, self)
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
            each, _ = class_gradients(tail, states)
            found.append(cosine_similarity(each.flatten(1), gradient.flatten()[None]).argmax())
            spent += len(each)
            progress(n + 1, len(lengths))
        return Guess(labels=torch.stack(found), budget={"forwards": spent})


@define(slots=False)
class _Backwards:
    """The labels of one text, last position first; `left` is what the solved labels do not explain."""

    tail: Any
    states: Tensor  # (1, T, D)
    gradient: Tensor  # (T, D)
    plan: LabelEnumeration
    forwards: int = 0

    def solve(self) -> Tensor:
        self.left, self.factor = self.gradient.clone(), 0.0
        labels = torch.full((len(self.left),), -1)
        floor = self.plan.silent * self.gradient.norm(dim=1).max()
        for position in range(len(self.left) - 2, -1, -1):  # the last row predicts nothing
            if self.left[position].norm() > floor:
                labels[position] = self._solve(position)
        return labels

    def _solve(self, position: int) -> int:
        """Find the label of one row and subtract what it explains of this row and the earlier ones."""
        upto, seen = self.states[:, : position + 1], self.left[position]
        tokens = self._shortlist(upto, seen)
        each = token_gradients(self.tail, upto, tokens)  # (K, t, D)
        self.forwards += len(tokens)
        best = int(cosine_similarity(each[:, -1], seen[None]).argmax())
        own = each[best, -1]
        # The loss is a mean over as many labels as there are, and a defense may have scaled it:
        # the row found first says by how much.
        self.factor = self.factor or float(seen @ own / own.square().sum())
        self.left[: position + 1] -= self.factor * each[best]
        return int(tokens[best])

    def _shortlist(self, upto: Tensor, seen: Tensor) -> Tensor:
        """The tokens whose logits fall most when the state moves along the gradient that was seen."""
        step = torch.zeros_like(upto)
        step[0, -1] = seen * (1e-2 * upto[0, -1].norm() / seen.norm())
        with torch.no_grad():
            ahead, behind = self.tail(upto + step)[0, -1], self.tail(upto - step)[0, -1]
        self.forwards += 2
        slope = ahead - behind  # (V,), of d logits
        return slope.topk(min(self.plan.candidates, len(slope)), largest=False).indices
