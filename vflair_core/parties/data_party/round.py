"""One round, from hidden states to gradients back. Read this file first.

    text ─ tokenize ─ embed ─ head ─► smashed ─[on_smashed]─► channel ─► body (or tail, in HT)
                                                                              │
    loss ◄─ local tail ◄─[on_returned]◄──────────────── channel ◄── returned ─┘
      └─ backward ─► hidden_grad ─[on_gradient]─► channel ─► … ─► smashed_grad ─[on_smashed_grad]─► head

The data party's model runs its own forward (`data_party.py`). Where its absent modules would have
computed, they recorded a program (`absent.py`); `cross` sends that program's inputs through the defenses
and the channel, and the model party runs it (`model_party.py`). The autograd graph ends where trust ends:
`Cut` is the only thing that touches the channel, and what it hands over are copies.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vflair_core.communication.message import Crossing, Role

if TYPE_CHECKING:
    from vflair_core.communication.program import Program
    from vflair_core.defenses.defense import Exchange
    from vflair_core.parties.data_party.party import DataParty


def cross(
    party: DataParty,
    exchange: Exchange,
    program: Program,
    leaves: list[Tensor],
    roles: tuple[Role, ...],
    cache: dict[str, Any] | None,
) -> list[Tensor]:
    """Send what `program` takes, return what it gives: one exchange, on every one of them every defense."""
    names = [name for name, _, _ in program.leaves]
    defended = [
        party.defenses.apply("on_smashed", leaf, exchange, name=name, role=role)
        if role == "smashed"
        else leaf
        for name, role, leaf in zip(names, roles, leaves, strict=True)
    ]
    # The model party's weights may need gradients even when nothing before the cut does.
    anchor = torch.zeros((), requires_grad=True)
    # Inside `Cut.forward` gradients are always off and `needs_input_grad` knows nothing of no_grad().
    grad = torch.is_grad_enabled()
    returned = Cut.apply(party, exchange, program, roles, cache, grad, anchor, *defended)  # type: ignore[no-untyped-call]
    return [
        party.defenses.apply("on_returned", tensor, exchange, name="returned", role="returned")
        for tensor in returned
    ]


class Cut(torch.autograd.Function):
    """The cut itself: forward sends smashed data, backward sends the hidden gradient."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        party: DataParty,
        exchange: Exchange,
        program: Program,
        roles: tuple[Role, ...],
        cache: dict[str, Any] | None,
        grad: bool,  # noqa: FBT001 - autograd functions take positions only
        _anchor: Tensor,
        *leaves: Tensor,
    ) -> tuple[Tensor, ...]:
        wants = [n for n, needed in enumerate(ctx.needs_input_grad[7:]) if needed and grad]
        crossings = [
            Crossing(name, role, leaf.detach())
            for (name, _, _), role, leaf in zip(program.leaves, roles, leaves, strict=True)
        ]
        meta = {
            **party.line.program(program),
            "grad": grad,
            "wants": wants,
            "training": party.model.training,
            "autocast": _autocast_dtype(leaves[0].device.type),
            "cache": cache,
            "counterparts": not party.defenses.bypassed,
        }
        reply = party.line.request("forward", exchange, crossings, meta)
        outputs = tuple(crossing.tensor.to(leaves[0].device) for crossing in reply.tensors)
        live = [n for n, alive in enumerate(reply.meta["live"]) if alive]
        ctx.mark_non_differentiable(*(out for n, out in enumerate(outputs) if n not in live))
        ctx.set_materialize_grads(False)
        ctx.party, ctx.exchange, ctx.wants, ctx.width = party, exchange, wants, len(leaves)
        if live:
            weakref.finalize(ctx, party.line.graphs.append, exchange.number)
        return outputs

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        party, exchange = ctx.party, ctx.exchange
        there = [n for n, gradient in enumerate(gradients) if gradient is not None]
        defended = [_defended_gradient(party, exchange, "hidden_grad", gradients[n]) for n in there]
        crossings = [Crossing("hidden_grad", "hidden_grad", gradient) for gradient in defended]
        meta = {
            "outputs": there,
            "keep": torch._C._autograd._get_current_graph_task_keep_graph(),
            # The first is the anchor, a leaf: `autograd.grad` and `backward(inputs=...)` leave the `.grad` of all other weights alone.
            "accumulate": torch._C._will_engine_execute_node(ctx.next_functions[0][0]),
        }
        reply = party.line.request("backward", exchange, crossings, meta)
        answer: list[Tensor | None] = [None] * ctx.width
        for index, crossing in zip(ctx.wants, reply.tensors, strict=True):
            gradient = crossing.tensor.to(defended[0].device)
            answer[index] = _defended_gradient(party, exchange, "smashed_grad", gradient)
        return (None, None, None, None, None, None, None, *answer)


def _defended_gradient(
    party: DataParty,
    exchange: Exchange,
    name: Literal["hidden_grad", "smashed_grad"],
    gradient: Tensor | None,
) -> Tensor:
    """Pass a gradient through the defenses without the factor by which a `GradScaler` scaled the loss."""
    assert gradient is not None
    place = "on_gradient" if name == "hidden_grad" else "on_smashed_grad"
    if not party.defenses.at(place):
        return gradient
    if not gradient.isfinite().all():
        party.overflowed = True  # said here, for a defense may turn it into something finite
    scale = party.loss_scale
    gradient = party.defenses.apply(place, gradient / scale, exchange, name=name, role=name)
    return gradient * scale


def _autocast_dtype(device: str) -> str | None:
    if not torch.is_autocast_enabled(device):
        return None
    return str(torch.get_autocast_dtype(device)).removeprefix("torch.")
