"""The limits of `vflair serve`: which there are, and what the operator says of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from vflair_core.errors import VflairError, alternatives

if TYPE_CHECKING:
    import torch

    from vflair_core.communication.remote.served_stream import ServerLimits
    from vflair_core.parties.model_party.caps import Caps

SIZES = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
SERVER = {  # limits of the server itself, beside those of the model party
    "streams": "connections at a time; each takes a thread",
    "stall": "seconds in which the next piece of a message must come",
    "idle": "seconds after which a connection on which nothing comes is closed",
}


def asked_limits(words: Sequence[str]) -> dict[str, int]:
    """``name=value`` of each word; a value may be of KiB, MiB, GiB or TiB."""
    found = {}
    for word in words:
        match = re.fullmatch(r"\s*(\w+)\s*=\s*(\d+)\s*(\w*)\s*", word)
        if match is None or match[3] not in SIZES:
            raise VflairError(
                f"--limit {word!r} is no limit. Write name=value, as sessions=16 or graph_bytes=4GiB."
            )
        found[match[1]] = int(match[2]) * SIZES[match[3]]
    return found


def limits_of(asked: Mapping[str, int], device: torch.device) -> tuple[Caps, ServerLimits]:
    """The limits of the model party and of the server, as the operator wants them."""
    from vflair_core.communication.remote.served_stream import ServerLimits
    from vflair_core.parties.model_party.caps import Caps

    caps, server = Caps.fitted(device), ServerLimits()
    possible = [name for name, _, _ in rows_of(caps, server)]
    for name, value in asked.items():
        if name not in possible:
            raise VflairError(f"There is no limit {name!r}.{alternatives(name, possible)}")
        if value < 1:
            raise VflairError(f"The limit {name} must be at least 1, not {value}.")
        if name in SERVER:
            change: dict[str, Any] = {name: value}
            server = attrs.evolve(server, **change)
        else:
            caps.changed(name, value)
    return caps, attrs.evolve(server, message_bytes=caps.message_bytes)


def rows_of(caps: Caps, server: ServerLimits) -> list[tuple[str, str, str]]:
    """Every limit with its value and what it is of."""
    ours = [(name, int(getattr(server, name)), what) for name, what in SERVER.items()]
    return [(name, str(value), what) for name, value, what in [*caps.table(), *ours]]
