"""One round, from hidden states to gradients back. Read this file first.

    text ─ tokenize ─ embed ─ head ─► smashed ─[on_smashed]─► channel ─► body (or tail, in HT)
                                                                              │
    loss ◄─ local tail ◄─[on_returned]◄──────────────── channel ◄── returned ─┘
      └─ backward ─► hidden_grad ─[on_gradient]─► channel ─► … ─► smashed_grad ─[on_smashed_grad]─► head

The data party's model runs its own forward (`model_calls.py`). Where the modules it does not hold would have
computed, their stubs record a program (`stubs.py`, `recorder.py`); `round_trip` sends what that program takes
through the defenses and the channel, and the model party runs it (`../model_party/rounds.py`). The autograd graph
ends where trust ends: `communication/autograd.py` has the only function that touches the channel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from attrs import define
from torch import Tensor

from vflair_core.communication.autograd import Gradient, Request, Sent, cross
from vflair_core.communication.connection import Connection
from vflair_core.communication.message import Role
from vflair_core.communication.program import Program
from vflair_core.defenses.defense import Exchange
from vflair_core.defenses.pipeline import Defenses
from vflair_core.parties.data_party.releases import ReleaseCounts
from vflair_core.partition.adapter_state import AdapterState


@define
class LossScale:
    """The factor of the loss (a `GradScaler`'s), which defenses must not see, and whether it was too large."""

    factor: float = 1.0
    overflowed: bool = (
        False  # a gradient that was not finite came to the defenses since the last step
    )


def round_trip(
    connection: Connection,
    defenses: Defenses,
    counts: ReleaseCounts,
    scale: LossScale,
    exchange: Exchange,
    program: Program,
    leaves: list[Tensor],
    roles: tuple[Role, ...],
    answer: list[Tensor],
    *,
    cache: dict[str, Any] | None,
    training: bool,
    adapters: AdapterState | None,
    count: Callable[[str], None],
) -> list[Tensor]:
    """Send what `program` takes, return what it gives: one exchange, on every one of them every defense.

    `answer` has the form of what it gives, which a reply must have; `count` is told the role of each gradient that
    crosses later.
    """
    names = [name for name, _, _ in program.leaves]
    sent = [
        defenses.apply("on_smashed", leaf, exchange, name=name, role=role)
        if role == "smashed"
        else leaf
        for name, role, leaf in zip(names, roles, leaves, strict=True)
    ]
    request = Request(
        connection,
        exchange.number,
        exchange.phase,
        program,
        roles,
        cache,
        training=training,
        counterparts=not defenses.bypassed,
        inspect=partial(_account_for, defenses, counts, exchange, program),
        guard=partial(_defended_gradient, defenses, counts, scale, exchange, count),
        adapters=None if adapters is None else adapters.to_wire(),
        answer=answer,
    )
    return [
        defenses.apply("on_returned", tensor, exchange, name="returned", role="returned")
        for tensor in cross(request, sent)
    ]


def _account_for(
    defenses: Defenses,
    counts: ReleaseCounts,
    exchange: Exchange,
    program: Program,
    sent: list[Sent],
) -> None:
    """See that what is about to be sent has been through every defense, and count it."""
    account = exchange.account
    defenses.check_sent(sent, account, program.modules)
    if not (account.bypassed or account.public):
        counts.sent(account.owners, [tensor for _, role, tensor in sent if role == "smashed"])


def _defended_gradient(
    defenses: Defenses,
    counts: ReleaseCounts,
    scale: LossScale,
    exchange: Exchange,
    count: Callable[[str], None],
    name: Gradient,
    gradient: Tensor,
) -> Tensor:
    """Pass a gradient through the defenses without the factor by which a `GradScaler` scaled the loss."""
    count(name)
    if name == "hidden_grad":
        defenses.check_gradient(exchange.account, torch._C._current_graph_task_id())
        if not (exchange.account.bypassed or exchange.account.public):
            counts.gradient(exchange.account.owners)
    place = "on_gradient" if name == "hidden_grad" else "on_smashed_grad"
    if not defenses.at(place):
        return gradient
    if not gradient.isfinite().all():
        scale.overflowed = True  # said here, for a defense may turn it into something finite
    factor = scale.factor
    return defenses.apply(place, gradient / factor, exchange, name=name, role=name) * factor
