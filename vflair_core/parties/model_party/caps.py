"""How much data parties may ask of the model party: one table, the operator's. A request over a cap is refused, nothing is dropped.

A cap is looked up before memory or time is taken. `vflair serve --show-limits` prints the table, and `--limit name=value`
changes it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import attrs
import torch
from attrs import define
from transformers import PreTrainedConfig

from vflair_core.errors import ProtocolError, alternatives

GIB = 2**30
LONGEST, SHORTEST = (
    2**17,
    4096,
)  # positions: where a model does not say, and what every model is given


def _cap(default: int, what: str) -> Any:
    return attrs.field(default=default, metadata={"what": what}, validator=_at_least_one)


def _at_least_one(_: Any, field: attrs.Attribute[int], value: Any) -> None:
    if type(value) is not int or value < 1:
        raise ProtocolError(f"The limit {field.name} must be a whole number >= 1, not {value!r}.")


@define(eq=False)
class Caps:
    """The limits of a model party. By default bytes come of the memory of its device, positions of its model (`fitted`)."""

    sessions: int = _cap(256, "data parties at a time")
    session_name: int = _cap(128, "characters of a session's name")
    message_bytes: int = _cap(GIB, "bytes of one message that comes in")
    graphs: int = _cap(256, "forwards of a session that wait for their backward")
    graph_bytes: int = _cap(8 * GIB, "bytes that such forwards hold, of all sessions, as estimated")
    caches: int = _cap(64, "key-value caches of a session")
    cache_bytes: int = _cap(8 * GIB, "bytes of the caches of all sessions")
    cache_rows: int = _cap(4096, "rows of a cache, as beams and speculation multiply them")
    positions: int = _cap(LONGEST, "positions of one row; by default the model's, 4096 at least")
    gradient_bytes: int = _cap(8 * GIB, "bytes of the gradients of all sessions")
    reply_bytes: int = _cap(
        2 * GIB, "bytes of replies that are kept in case they are lost, of all sessions"
    )
    graph_seconds: int = _cap(60, "seconds that a forward may hold up the steps of other sessions")
    programs: int = _cap(1024, "programs of a session")
    step_bytes: int = _cap(8 * GIB, "bytes of what the operations of one program give, at a time")
    counterparts: int = _cap(16, "modules that the defenses of a session put here")
    saved_steps: int = _cap(64, "checkpoints of a session on disk")
    saved_bytes: int = _cap(64 * GIB, "bytes of the checkpoints of all sessions on disk")

    @classmethod
    def fitted(cls, device: torch.device, config: PreTrainedConfig | None = None) -> Caps:
        """The defaults for a model of `config` on `device`: what is held for data parties may take half of its memory."""
        half = max(memory_of(device) // 2, 1)
        longest = getattr(config, "max_position_embeddings", None)
        return cls(
            positions=max(longest, SHORTEST) if type(longest) is int else LONGEST,
            graph_bytes=half,
            cache_bytes=half,
            step_bytes=half,
            gradient_bytes=half,
            reply_bytes=max(half // 4, 1),
        )

    def changed(self, name: str, value: int) -> None:
        """Set one cap.

        Raises:
            ProtocolError: There is none of that name, or it cannot be `value`.
        """
        names = [field.name for field in attrs.fields(Caps)]
        if name not in names:
            raise ProtocolError(f"There is no limit {name!r}.{alternatives(name, names)}")
        setattr(self, name, value)

    def table(self) -> Iterator[tuple[str, int, str]]:
        """Each cap: its name, its value, and what it is of."""
        for field in attrs.fields(Caps):
            yield field.name, getattr(self, field.name), field.metadata["what"]


def memory_of(device: torch.device) -> int:
    """Bytes of memory that a device has."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
