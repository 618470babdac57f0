"""A step on the weights of a session, over a chain of model parties: all see that they can take it, then all take it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vflair_core.communication.message import Crossing, Message, reply
from vflair_core.communication.optimizers import LARGEST, check_options
from vflair_core.errors import ProtocolError, shown
from vflair_core.parties.model_party.session import Session, StepOptions
from vflair_core.parties.model_party.shared_weights import SharedWeights, largest_of, norms_of


def norms(model: nn.Module, shared: SharedWeights, session: Session, message: Message) -> Message:
    """Tell the norm of each weight's gradient, of all parties of the chain."""
    shared.show(session)
    names, own = norms_of(model)
    session.largest = largest_of(own)
    if session.onward is not None:
        theirs = session.onward.connection.request("norms")
        names += theirs.meta["names"]
        own = torch.cat([own, theirs.tensors[0].tensor])
    return reply(message, (Crossing("norms", "norms", own),), {"names": names})


def prepare(shared: SharedWeights, session: Session, message: Message) -> StepOptions:
    """See, over the whole chain, that the step can be taken; nothing is changed.

    Raises:
        ProtocolError: It cannot.
    """
    skip, scale, rate = (message.meta[key] for key in ("skip", "scale", "lr"))
    if not session.trains:
        raise ProtocolError(
            "This session was opened without an optimizer; there is no step to commit."
        )
    numbers = [rate] if scale is None else [rate, scale]
    fit = all(type(n) in (int, float) and 0 <= n <= LARGEST for n in numbers)
    if not fit or not isinstance(skip, bool):
        raise ProtocolError(
            "A commit needs 'skip' (true or false), a 'scale' (None or a number) and a learning rate 'lr': numbers from 0 "
            f"to {LARGEST:g}."
        )
    groups = message.meta.get("groups")
    if groups is not None:
        check_options(shared.optimizer, groups)
    rule = message.meta.get("sharing", shared.rule)
    if rule != shared.rule:
        raise ProtocolError(
            f"The party before shares weights by {shown(rule)} and this one by {shared.rule!r}: set the same "
            "`sharing` at all model parties of a chain."
        )
    step = StepOptions(rate, groups)
    shared.check(session, step)
    if not skip:
        shared.check_finite(session, 1.0 if scale is None else scale)
    if session.onward is not None:
        session.onward.connection.request("prepare", meta=_told(shared, message))
    return step


def commit(shared: SharedWeights, session: Session, message: Message) -> None:
    """Take the step, or skip it; the last party of a chain goes first.

    Raises:
        ProtocolError: It cannot be taken, and nothing has changed.
    """
    step = prepare(shared, session, message)
    if session.onward is not None:
        onward = session.onward.connection
        onward.request("commit", meta=_told(shared, message))
        onward.step += 1
    skip, scale = message.meta["skip"], message.meta["scale"]
    shared.commit(session, scale=scale, options=step, skip=skip)
    session.step += 1
    session.begin_step()


def _told(shared: SharedWeights, message: Message) -> dict[str, Any]:
    """What the next party of a chain is told of a step."""
    kept = ("skip", "scale", "lr", "groups")
    told = {key: message.meta[key] for key in kept if key in message.meta}
    return told | {"sharing": shared.rule}
