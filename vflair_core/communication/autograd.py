"""The graph across the channel: forward sends smashed data, backward sends the hidden gradient."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from attrs import frozen
from torch import Tensor

from vflair_core.communication.codec import DTYPES
from vflair_core.communication.connection import Connection
from vflair_core.communication.message import Crossing, Phase, Role
from vflair_core.communication.program import Program
from vflair_core.communication.replies import Due, check_tensors
from vflair_core.errors import SecondDerivativeError

Gradient = Literal["hidden_grad", "smashed_grad"]
Sent = tuple[str, Role, Tensor]  # name, role, and what is sent under them
UNKNOWN = torch.Size([0])  # the shape of a form of which only the type is known


@frozen(eq=False)
class Request:
    """What an exchange needs besides its tensors.

    `inspect` sees every tensor before it is sent, with name and role, and raises if it must not be. `guard` sees every
    gradient of the exchange: the hidden gradient before it is sent, and the smashed gradient before it goes on into
    the graph.
    """

    connection: Connection
    exchange: int
    phase: Phase
    program: Program
    roles: tuple[Role, ...]  # of the tensors that the program takes
    cache: dict[str, Any] | None
    training: bool
    counterparts: bool  # whether the model party applies the modules that defenses put there
    inspect: Callable[[list[Sent]], None]
    guard: Callable[[Gradient, Tensor], Tensor]
    adapters: dict[str, Any] | None = None  # which are on (`AdapterState.to_wire`)
    answer: Sequence[Tensor] | None = (
        None  # the form of what the program gives: meta tensors; None where it is not known here
    )


def cross(request: Request, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """Let the party behind the connection run the program on `tensors`, and return its answer, with gradients."""
    # The other party's weights may need gradients even when nothing before the cut does.
    anchor = torch.zeros((), requires_grad=True)
    # Inside `Cut.forward` gradients are always off and `needs_input_grad` knows nothing of no_grad().
    grad = torch.is_grad_enabled()
    # Numbers that lead to what was sent, without holding it.
    threads = [tensor.reshape(-1)[:1].sum() for tensor in tensors if grad and tensor.requires_grad]
    return Cut.apply(request, grad, anchor, threads, *tensors)  # type: ignore[no-untyped-call, no-any-return]


class Cut(torch.autograd.Function):
    """The cut itself: the only thing that touches the channel, and what it hands over are copies."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        request: Request,
        grad: bool,  # noqa: FBT001 - autograd functions take positions only
        _anchor: Tensor,
        threads: list[Tensor],
        *leaves: Tensor,
    ) -> tuple[Tensor, ...]:
        program, connection = request.program, request.connection
        wants = [n for n, needed in enumerate(ctx.needs_input_grad[4:]) if needed and grad]
        names = [name for name, _, _ in program.leaves]
        sent = list(zip(names, request.roles, leaves, strict=True))
        request.inspect(sent)
        crossings = [Crossing(name, role, leaf.detach()) for name, role, leaf in sent]
        meta = {
            **connection.program(program),
            "grad": grad,
            "wants": wants,
            "training": request.training,
            "autocast": _autocast_dtype(leaves[0].device.type),
            "cache": request.cache,
            "counterparts": request.counterparts,
        }
        if request.adapters is not None:
            meta["adapters"] = request.adapters
        reply = connection.request(
            "forward", crossings, meta, exchange=request.exchange, phase=request.phase
        )
        live = [n for n, alive in enumerate(reply.meta["live"]) if alive]
        if live:
            weakref.finalize(ctx, connection.graphs.append, request.exchange)
        if request.answer is not None:
            due = [_due_form(form, meta["autocast"]) for form in request.answer]
            check_tensors("forward", reply.tensors, due)
        outputs = tuple(crossing.tensor.to(leaves[0].device) for crossing in reply.tensors)
        ctx.mark_non_differentiable(*(out for n, out in enumerate(outputs) if n not in live))
        ctx.set_materialize_grads(False)
        ctx.request, ctx.wants, ctx.width, ctx.threads = request, wants, len(leaves), threads
        ctx.due = [
            Due("smashed_grad", "smashed_grad", tuple(leaves[n].shape), (leaves[n].dtype,))
            for n in wants
        ]
        return outputs

    @staticmethod
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
        check_tensors("backward", reply.tensors, ctx.due)
        answer: list[Tensor | None] = [None] * ctx.width
        for index, crossing in zip(ctx.wants, reply.tensors, strict=True):
            came = request.guard("smashed_grad", crossing.tensor.to(guarded[0].device))
            # It depends on what was sent, and on the gradient that was.
            answer[index] = Once.apply(came, *ctx.threads, *(gradient for _, gradient in of))  # type: ignore[no-untyped-call]
        return (None, None, None, None, *answer)


class Once(torch.autograd.Function):
    """Passes a gradient that came back, and refuses to be differentiated.

    The others it is given are those that the gradient depends on, at the model party. Autograd knows of no such
    dependence and would leave it out: whoever differentiates by any of them meets this instead.
    """

    @staticmethod
    def forward(_ctx: Any, gradient: Tensor, *_others: Tensor) -> Tensor:  # type: ignore[override]
        return gradient.view_as(gradient)

    @staticmethod
    def backward(_ctx: Any, *_: Tensor) -> Any:
        raise SecondDerivativeError(
            "A second derivative through the cut was asked for. The model party's layers have only their first one here, "
            "so you cannot differentiate twice through them, and the result would be wrong. Differentiate once, or "
            "only what lies on the data party's side of the cut."
        )


def _due_form(form: Tensor, autocast: str | None) -> Due:
    # Forms are found without autocast, which gives what is floating its own type where it thinks best, without a cache
    # and with texts of another length: keys, values and biases, of four dimensions, count positions.
    may_be = (
        {form.dtype, DTYPES[autocast]} if autocast and form.is_floating_point() else {form.dtype}
    )
    shape = None if form.shape == UNKNOWN else tuple(form.shape)
    return Due("returned", "returned", shape, tuple(may_be), form.dim() >= 4)


def _autocast_dtype(device: str) -> str | None:
    if not torch.is_autocast_enabled(device):
        return None
    return str(torch.get_autocast_dtype(device)).removeprefix("torch.")
