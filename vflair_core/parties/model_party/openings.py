"""What is looked at before a session is opened: nothing has changed when it is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from vflair_core.communication import counterparts
from vflair_core.communication.message import Message
from vflair_core.errors import ProtocolError, shown
from vflair_core.parties.model_party.caps import Caps
from vflair_core.parties.model_party.session import Session
from vflair_core.partition.fingerprint import differences


def check(message: Message, fingerprint: str, caps: Caps, sessions: Mapping[str, Session]) -> None:
    """See that a session may be opened beside the others.

    Raises:
        ProtocolError: It is of another model or cut, or one too many.
    """
    meta, name = message.meta, message.session
    if meta.get("fingerprint") != fingerprint:
        raise ProtocolError(
            "The parties do not hold two halves of the same model: the data party has "
            f"{differences(meta.get('fingerprint'), fingerprint)} at the model party. Use the same model, "
            "revision, dtype and partition on both sides."
        )
    if len(name) > caps.session_name:
        raise ProtocolError(
            f"A session's name may have {caps.session_name} characters, not {len(name)}."
        )
    if name not in sessions and len(sessions) >= caps.sessions:
        raise ProtocolError(
            f"The model party has {len(sessions)} sessions, as many as it allows. Try again later."
        )
    if len(meta.get("counterparts", ())) > caps.counterparts:
        raise ProtocolError(
            f"A session may put {caps.counterparts} modules of defenses at the model party."
        )


def counterparts_of(message: Message) -> list[nn.Module]:
    """Build the modules that the defenses of a session put at the model party.

    Raises:
        ProtocolError: One is of a kind that is not built, or its weights did not come.
    """
    weights = {c.name: c.tensor for c in message.tensors if c.role == "counterpart"}
    specs = enumerate(message.meta.get("counterparts", ()))
    return [counterparts.build(spec, f"{n}.", weights) for n, spec in specs]


def check_resume(name: str, back: Any, sessions: Mapping[str, Session]) -> None:
    """See that the weights may go back to one of the steps `back` for the session `name`.

    Raises:
        ProtocolError: These are no steps, or other sessions are in the middle of theirs.
    """
    if not isinstance(back, (list, tuple)) or not all(type(n) is int for n in back):
        raise ProtocolError(f"'resume' must be a list of steps, not {shown(back)}.")
    others = [session for key, session in sessions.items() if key != name]
    if any(other.graphs for other in others):
        raise ProtocolError(
            "A forward still waits for its backward: the weights it went through cannot be changed."
        )
    if any(other.trains and other.step for other in others):
        raise ProtocolError(
            "Another data party trains these weights now. Go back to a checkpoint when it has closed."
        )
