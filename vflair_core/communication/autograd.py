"""The graph across the channel: forward sends smashed data, backward sends the hidden gradient."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Literal

import torch
from attrs import frozen
from torch import Tensor
from torch.autograd.function import once_differentiable

from vflair_core.communication.connection import Connection
from vflair_core.communication.message import Crossing, Phase, Role
from vflair_core.communication.program import Program

Gradient = Literal["hidden_grad", "smashed_grad"]


@frozen(eq=False)
class Request:
    """What an exchange needs besides its tensors.

    `guard` sees every gradient of the exchange: the hidden gradient before it is sent, and the smashed gradient
    before it goes on into the graph.
    """

    connection: Connection
    exchange: int
    phase: Phase
    program: Program
    roles: tuple[Role, ...]  # of the tensors that the program takes
    cache: dict[str, Any] | None
    training: bool
    counterparts: bool  # whether the model party applies the modules that defenses put there
    guard: Callable[[Gradient, Tensor], Tensor]


def cross(request: Request, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """Let the party behind the connection run the program on `tensors`, and return its answer, with gradients."""
    # The other party's weights may need gradients even when nothing before the cut does.
    anchor = torch.zeros((), requires_grad=True)
    # Inside `Cut.forward` gradients are always off and `needs_input_grad` knows nothing of no_grad().
    grad = torch.is_grad_enabled()
    return Cut.apply(request, grad, anchor, *tensors)  # type: ignore[no-untyped-call, no-any-return]


class Cut(torch.autograd.Function):
    """The cut itself: the only thing that touches the channel, and what it hands over are copies."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        request: Request,
        grad: bool,  # noqa: FBT001 - autograd functions take positions only
        _anchor: Tensor,
        *leaves: Tensor,
    ) -> tuple[Tensor, ...]:
        program, connection = request.program, request.connection
        wants = [n for n, needed in enumerate(ctx.needs_input_grad[3:]) if needed and grad]
        crossings = [
            Crossing(name, role, leaf.detach())
            for (name, _, _), role, leaf in zip(program.leaves, request.roles, leaves, strict=True)
        ]
        meta = {
            **connection.program(program),
            "grad": grad,
            "wants": wants,
            "training": request.training,
            "autocast": _autocast_dtype(leaves[0].device.type),
            "cache": request.cache,
            "counterparts": request.counterparts,
        }
        reply = connection.request(
            "forward", crossings, meta, exchange=request.exchange, phase=request.phase
        )
        outputs = tuple(crossing.tensor.to(leaves[0].device) for crossing in reply.tensors)
        live = [n for n, alive in enumerate(reply.meta["live"]) if alive]
        ctx.mark_non_differentiable(*(out for n, out in enumerate(outputs) if n not in live))
        ctx.set_materialize_grads(False)
        ctx.request, ctx.wants, ctx.width = request, wants, len(leaves)
        if live:
            weakref.finalize(ctx, connection.graphs.append, request.exchange)
        return outputs

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        request: Request = ctx.request
        of = [(n, gradient) for n, gradient in enumerate(gradients) if gradient is not None]
        guarded = [request.guard("hidden_grad", gradient) for _, gradient in of]
        crossings = [Crossing("hidden_grad", "hidden_grad", gradient) for gradient in guarded]
        meta = {
            "outputs": [n for n, _ in of],
            "keep": torch._C._autograd._get_current_graph_task_keep_graph(),
            # The first is the anchor, a leaf: `autograd.grad` and `backward(inputs=...)` leave the `.grad` of all other weights alone.
            "accumulate": torch._C._will_engine_execute_node(ctx.next_functions[0][0]),
        }
        reply = request.connection.request(
            "backward", crossings, meta, exchange=request.exchange, phase=request.phase
        )
        answer: list[Tensor | None] = [None] * ctx.width
        for index, crossing in zip(ctx.wants, reply.tensors, strict=True):
            answer[index] = request.guard("smashed_grad", crossing.tensor.to(guarded[0].device))
        return (None, None, None, *answer)


def _autocast_dtype(device: str) -> str | None:
    if not torch.is_autocast_enabled(device):
        return None
    return str(torch.get_autocast_dtype(device)).removeprefix("torch.")
