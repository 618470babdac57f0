"""How messages travel, and how they are counted and watched on the way."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, Protocol, TypeVar

import attrs
import torch
from attrs import define
from torch import Tensor

from vflair_core.communication import codec
from vflair_core.communication.message import Crossing, Kind, Message, Role, reply, to_be_rounded
from vflair_core.communication.wire_dtype import WireDtype, check_wire_dtype, restored, rounded
from vflair_core.errors import ProtocolError

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
    party's side, so that they hold for every channel: bytes as they cross, tensors as they come out of the rounding that
    `wire_dtype` names.
    """

    lasting = False  # whether it may outlive the model party, and find it started anew
    patience = 0.0  # seconds in which a busy model party is asked again
    wire_dtype: WireDtype = "float32"  # what hidden states and their gradients are rounded to

    def __init__(self) -> None:
        self.traffic: dict[tuple[Role, Direction], Traffic] = {}
        self.carried: Counter[tuple[Role, Direction]] = Counter()  # messages with a tensor of it
        self.by_kind: Counter[Kind] = Counter()  # requests, each of which had a reply
        self.messages = 0
        self.seconds = 0.0
        self._watchers: list[Watcher] = []

    @property
    def handled(self) -> float | None:
        """Seconds of `seconds` in which the model party answered; None where it is in another process."""
        return None

    @abstractmethod
    def deliver(self, message: Message) -> Message:
        """Bring `message` to the model party and return its reply."""

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Let go of what the channel holds, such as a connection. The session is not ended."""

    def request(self, message: Message) -> Message:
        """Send `message`, wait for the reply, count both and show copies to whoever taps."""
        message = to_be_rounded(message, self.wire_dtype)
        start = time.perf_counter()
        reply = self.deliver(message)
        seconds = time.perf_counter() - start
        self.messages += 1
        self.by_kind[message.kind] += 1
        self.seconds += seconds
        self._count(message, "sent")
        self._count(reply, "received")
        for watcher in tuple(self._watchers):
            watcher(as_it_arrives(message), "sent", seconds)
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
        self.carried.update((role, direction) for role in {c.role for c in message.tensors})
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
        wire_dtype: With `wire`, round hidden states and their gradients to ``bfloat16`` or ``int8`` on their way, as a
            remote channel may; ``float32`` rounds nothing.

    Raises:
        ProtocolError: There is no such wire dtype, or messages are not passed through the codec.
    """

    def __init__(
        self, handle: Handler, *, wire: bool = False, wire_dtype: WireDtype = "float32"
    ) -> None:
        super().__init__()
        self._handle = handle
        self._handled = 0.0
        self.wire = wire
        self.wire_dtype = check_wire_dtype(wire_dtype)
        if wire_dtype != "float32" and not wire:
            raise ProtocolError(
                f"Nothing is rounded to {wire_dtype} where messages do not pass through the codec: set wire=True."
            )

    @property
    def handled(self) -> float | None:
        """Seconds in which the model party answered."""
        return self._handled

    def deliver(self, message: Message) -> Message:
        if self.wire:
            arrived = codec.read(codec.chunks(message), wire_dtype=self.wire_dtype)
            answer = to_be_rounded(
                self._answered(attrs.evolve(arrived, once=True)), self.wire_dtype
            )
            return codec.read(codec.chunks(answer), wire_dtype=self.wire_dtype)
        return _handed_over(self._answered(_copy(message, once=True)))

    def _answered(self, message: Message) -> Message:
        """Let the model party answer, and count the seconds; on CUDA until the answer is there."""
        start = time.perf_counter()
        answer = self._handle(message)
        for device in {c.tensor.device for c in answer.tensors if c.tensor.is_cuda}:
            torch.cuda.synchronize(device)
        self._handled += time.perf_counter() - start
        return answer


def _copy(message: Message, *, once: bool = False) -> Message:
    m = message
    copies = tuple(
        Crossing(c.name, c.role, _cloned(c.tensor), wire_dtype=c.wire_dtype)
        for c in message.tensors
    )
    return Message(m.kind, m.session, m.step, m.exchange, m.seq, m.phase, copies, m.meta, once)


def as_it_arrives(message: Message) -> Message:
    """Copy what is sent as the other side reads it: what is rounded on its way is, and all else is cloned."""
    copies = tuple(attrs.evolve(c, tensor=_arriving(c), let_go=False) for c in message.tensors)
    return reply(message, copies, message.meta)


def _arriving(c: Crossing) -> Tensor:
    if c.wire_dtype == "float32":
        return _cloned(c.tensor)
    payload = rounded(c.tensor, c.wire_dtype)
    return restored(payload, c.tensor.shape, c.tensor.dtype, c.wire_dtype)


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
