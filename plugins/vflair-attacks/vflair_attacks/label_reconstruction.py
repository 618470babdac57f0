"""Learn the labels that make the tail's gradient equal the one that was sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from attrs import field, frozen, validators
from torch import Tensor

from vflair_attacks.tails import class_gradients, each_example, need_hidden_states
from vflair_core import AttackError, Guess

Progress = Callable[[int, int], None]


@frozen
class BatchLabelReconstruction:
    """Minimise ‖∂/∂O [−Σ_c softmax(ŷ)_c · log softmax(tail(O))_c] − G_O‖² over dummy labels ŷ (BLI).

    Zou et al., "Defending Batch-Level Label Inference and Replacement Attacks in Vertical Federated Learning",
    IEEE Trans. Big Data 2022, arXiv 2112.05409. Differs from the paper: each example is matched by itself, as its
    gradient crosses by itself, and the gradient, which is linear in softmax(ŷ), is assembled from one gradient
    per class instead of being differentiated again in every iteration. The attacker's tail is in eval mode. What a known
    defense of gradients does on purpose is done to the dummy's gradient too.

    Attributes:
        iterations: Steps of Adam.
        learning_rate: Of Adam.
    """

    iterations: int = field(default=500, validator=validators.ge(1))
    learning_rate: float = field(default=0.05, validator=validators.gt(0))

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
        """Return labels (N,)."""
        need_hidden_states(partition, "bli")
        if task_kind != "classification":
            raise AttackError(
                f"bli learns one class per example and this is {task_kind}. For the tokens of a causal language "
                "model use label-enumeration."
            )
        labels, spent = [], 0
        for n, (states, gradient) in enumerate(each_example(returned, hidden_grad, lengths, tail)):
            each, _ = class_gradients(tail, states)
            if share is not None:
                each = each * share[n]
            labels.append(int(self._match(each, gradient, gradient_mechanism).argmax()))
            spent += len(each)
            progress(n + 1, len(lengths))
        budget = {"forwards": spent, "iterations": self.iterations * len(labels)}
        return Guess(labels=torch.tensor(labels), budget=budget)

    def _match(self, each: Tensor, target: Tensor, mechanism: Any) -> Tensor:  # (C, T, D), (T, D)
        """Return the dummy labels (C,) after the last iteration."""
        dummy = torch.zeros(len(each), device=each.device, requires_grad=True)
        optimizer = torch.optim.Adam([dummy], lr=self.learning_rate)
        scale = target.square().sum().clamp_min(1e-30)  # Adam hardly sees it; its epsilon does
        for _ in range(self.iterations):
            optimizer.zero_grad()
            made = torch.tensordot(dummy.softmax(0), each, 1)
            if mechanism is not None:
                made = mechanism.expected(made)
            loss = (made - target).square().sum() / scale
            loss.backward()
            optimizer.step()
        return dummy.detach()
