"""What the parties say to each other: one kind of envelope, a few tensors, each with its role."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import attrs
import torch
from attrs import field, frozen
from torch import Tensor

from vflair_core.communication.wire_dtype import WireDtype, is_rounded, rounded_size

Role = Literal[
    "smashed",  # depends on the text: what leaves the head
    "structure",  # does not depend on the text: masks, positions, rotary tables
    "weight",  # derives from a weight of the data party: T5's position bias
    "disclosed",  # depends on the text and is not a hidden state: crosses only by a recorded opt-in
    "returned",  # what comes back
    "hidden_grad",  # gradient the data party sends
    "smashed_grad",  # gradient the data party receives
    "norms",  # per-weight gradient norms of the model party
    "counterpart",  # weights of a defense's module behind the channel
]
Kind = Literal[
    "open", "forward", "backward", "facts", "norms", "prepare", "commit", "save", "release", "close"
]
Phase = Literal["train", "eval", "prefill", "decode", "control"]


@frozen(eq=False)
class Crossing:
    """A tensor that crosses the cut, under the name the model gives it and the role it plays.

    `let_go`: who sends it holds on to it no more, so within one process it may change hands instead of being copied.
    `wire_dtype`: what it is rounded to on its way, or was; ``float32`` rounds nothing (`wire_dtype.py`).
    """

    name: str
    role: Role
    tensor: Tensor
    let_go: bool = False
    wire_dtype: WireDtype = "float32"

    @property
    def nbytes(self) -> int:
        """Size of the payload in bytes, as it crosses; flags (bool) take one bit each."""
        if self.wire_dtype != "float32":
            return rounded_size(self.tensor.shape, self.wire_dtype)
        if self.tensor.dtype is torch.bool:
            return -(-self.tensor.numel() // 8)
        return self.tensor.numel() * self.tensor.element_size()


@frozen(eq=False)
class Message:
    """A request of the data party, or the model party's reply to it (same kind and numbers).

    `step` counts optimizer steps, `exchange` counts forwards across the cut in this session (a backward
    carries the number of its forward), `seq` counts messages. `meta` holds only what msgpack can carry.

    `once` does not cross: whoever delivers it within one process says that its reply cannot be lost, so that the model
    party need not keep it for a repetition.
    """

    kind: Kind
    session: str
    step: int
    exchange: int
    seq: int
    phase: Phase = "control"
    tensors: tuple[Crossing, ...] = ()
    meta: Mapping[str, Any] = field(factory=dict)
    once: bool = False

    @property
    def nbytes(self) -> int:
        """Size of all payloads in bytes, without the header."""
        return sum(crossing.nbytes for crossing in self.tensors)


def reply(
    message: Message, tensors: tuple[Crossing, ...] = (), meta: Mapping[str, Any] | None = None
) -> Message:
    """Answer `message` under the same kind and numbers."""
    m = message  # spelt out, for `attrs.evolve` takes as long as a small message does to cross
    return Message(m.kind, m.session, m.step, m.exchange, m.seq, m.phase, tensors, meta or {})


def to_be_rounded(message: Message, wire_dtype: WireDtype) -> Message:
    """Return `message` with every tensor marked that crosses rounded to `wire_dtype`."""
    if wire_dtype == "float32":
        return message
    return attrs.evolve(
        message,
        tensors=tuple(
            attrs.evolve(c, wire_dtype=wire_dtype)
            if is_rounded(c.role, c.tensor.dtype, wire_dtype)
            else c
            for c in message.tensors
        ),
    )
