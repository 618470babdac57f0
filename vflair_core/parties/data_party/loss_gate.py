"""Gradients come of the loss that the model gives, where defenses have seen its labels, or they do not leave.

The loss goes out through a gate that notes a backward pass which begins there. All else that the model gives, its
logits for example, goes out through one that notes nothing, so that a gradient which comes that way is refused where
it would be sent (`Defenses.check_gradient`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vflair_core.defenses.account import Account
from vflair_core.defenses.pipeline import Defenses


class _Gate(torch.autograd.Function):
    """Passes a tensor, and its gradient."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        tensor: Tensor,
        defenses: Defenses,
        account: Account,
        is_loss: bool,  # noqa: FBT001
    ) -> Tensor:
        ctx.defenses, ctx.account, ctx.is_loss = defenses, account, is_loss
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.is_loss:
            ctx.account.loss_pass = torch._C._current_graph_task_id()
        else:
            ctx.defenses.refuse_gradient(ctx.account)
        return gradient, None, None, None


def through_gates(outputs: Any, defenses: Defenses, account: Account, *, labelled: bool) -> Any:
    """Let everything that the model gives go out through its gate.

    Args:
        outputs: Of the model; a loss is named, or is the first of a tuple when the model was given labels.
        defenses: The data party's.
        account: Of the call.
        labelled: Whether the loss is of labels that went through the defenses.
    """

    def gated(value: Any, name: Any) -> Any:
        if isinstance(value, Tensor) and value.requires_grad:
            is_loss = labelled and name == "loss"
            return _Gate.apply(value, defenses, account, is_loss)  # type: ignore[no-untyped-call]
        if isinstance(value, (tuple, list)):
            return type(value)(gated(item, None) for item in value)
        return value

    if isinstance(outputs, dict):
        for name, value in list(outputs.items()):
            outputs[name] = gated(value, name)
        return outputs
    if isinstance(outputs, tuple):
        names = ["loss" if labelled and not n else None for n in range(len(outputs))]
        return tuple(gated(value, name) for value, name in zip(outputs, names, strict=True))
    return gated(outputs, None)
