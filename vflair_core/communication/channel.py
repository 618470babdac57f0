"""How messages travel, and how they are counted and watched on the way."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, Protocol, TypeVar

import torch
from attrs import define
from torch import Tensor

from vflair_core.communication import codec
from vflair_core.communication.message import Crossing, Message, Role, reply

Handler = Callable[[Message], Message]  # a model party's `handle`
Direction = Literal["sent", "received"]  # as the data party sees it


@define
class Traffic:
    """What crossed under one role in one direction."""

    tensors: int = 0
    bytes: int = 0
    rows: int = 0  # vectors of the last dimension: for smashed data, one row is one release


class Watcher(Protocol):
    """Anything that `Channel.tap` accepts; it gets a message whose tensors are copies."""

    def __call__(self, message: Message, direction: Direction, seconds: float, /) -> None: ...


W = TypeVar("W", bound="Watcher")


class Channel(ABC):
    """Carries requests of the data party to the model party and brings back the replies.

    Subclasses say only how one message is delivered. Counting and watching happen here, on the data
    party's side, so that they hold for every channel.
    """

    def __init__(self) -> None:
        self.traffic: dict[tuple[Role, Direction], Traffic] = {}
        self.messages = 0
        self.seconds = 0.0
        self._watchers: list[Watcher] = []

    @abstractmethod
    def deliver(self, message: Message) -> Message:
        """Bring `message` to the model party and return its reply."""

    def request(self, message: Message) -> Message:
        """Send `message`, wait for the reply, count both and show copies to whoever taps."""
        start = time.perf_counter()
        reply = self.deliver(message)
        seconds = time.perf_counter() - start
        self.messages += 1
        self.seconds += seconds
        self._count(message, "sent")
        self._count(reply, "received")
        for watcher in tuple(self._watchers):
            watcher(_copy(message), "sent", seconds)
            watcher(_copy(reply), "received", seconds)
        return reply

    @contextmanager
    def tap(self, watcher: W) -> Iterator[W]:
        """Let `watcher` see a copy of everything that crosses while the block runs."""
        self._watchers.append(watcher)
        try:
            yield watcher
        finally:
            self._watchers.remove(watcher)

    def _count(self, message: Message, direction: Direction) -> None:
        for crossing in message.tensors:
            counted = self.traffic.setdefault((crossing.role, direction), Traffic())
            counted.tensors += 1
            counted.bytes += crossing.nbytes
            width = crossing.tensor.shape[-1] if crossing.tensor.dim() else 1
            counted.rows += crossing.tensor.numel() // max(width, 1)


class LocalChannel(Channel):
    """Both parties in one process. Nothing is shared across the cut: tensors are cloned, or change hands.

    Logits are large, and the model party lets go of them when it has returned them.

    Args:
        handle: The model party's `handle`.
        wire: Pass every message through the real codec, byte for byte as a remote channel would.
    """

    def __init__(self, handle: Handler, *, wire: bool = False) -> None:
        super().__init__()
        self._handle = handle
        self.wire = wire

    def deliver(self, message: Message) -> Message:
        if self.wire:
            reply = self._handle(codec.read(codec.chunks(message)))
            return codec.read(codec.chunks(reply))
        return _handed_over(self._handle(_copy(message)))


def _copy(message: Message) -> Message:
    copies = tuple(Crossing(c.name, c.role, _cloned(c.tensor)) for c in message.tensors)
    return reply(message, copies, message.meta)


def _handed_over(message: Message) -> Message:
    """Copy what is not let go of, and what a graph still holds, such as an output it needs for its backward."""
    tensors = tuple(
        c if c.let_go and _is_alone(c.tensor) else Crossing(c.name, c.role, _cloned(c.tensor))
        for c in message.tensors
    )
    return reply(message, tensors, message.meta)


def _is_alone(tensor: Tensor) -> bool:
    """Whether no other tensor and no graph holds the memory of `tensor`, and it holds no more than it needs."""
    storage = tensor.untyped_storage()
    alone: bool = torch._C._storage_Use_Count(storage._cdata) == 2  # the tensor and `storage`
    whole = tensor.is_contiguous() and storage.nbytes() == tensor.nbytes
    return alone and whole and not tensor.requires_grad


def _cloned(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)
