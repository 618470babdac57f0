"""One stream of one client, at the server: greeted, then one message after the other to the model party and its reply back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import attrs
from attrs import field, frozen

from vflair_core.communication import codec, error_frames
from vflair_core.communication.channel import Handler
from vflair_core.communication.message import Message, to_be_rounded
from vflair_core.communication.remote import frames
from vflair_core.communication.remote.deadlines import Deadlines
from vflair_core.communication.remote.probe import echo, is_probe
from vflair_core.communication.remote.rights import Client
from vflair_core.communication.remote.session_names import SessionNames
from vflair_core.communication.wire_dtype import WIRE_DTYPES, WireDtype
from vflair_core.errors import ChannelError, ProtocolError, SessionLostError, VflairError
from vflair_core.events import events

log = events(__name__)

Renew = Callable[[Client], Client]
"""Says what a client may do now; refuses by a `ProtocolError` who is not known any more."""

MOST_ASKED = 128  # characters of the name under which a client asks for a session
GIB = 2**30


@frozen
class Served:
    """A message that was answered, for those who count: facts, no content."""

    client: str
    session: str
    kind: str
    received: int  # bytes of tensors
    sent: int  # bytes of tensors
    seconds: float  # in the model party
    refused: str | None  # the class of the error, where it was


@frozen
class ServerLimits:
    """What the server allows its peers.

    Attributes:
        message_bytes: Bytes of one message that comes in.
        streams: Streams at a time; each takes a thread while it lasts.
        stall: Seconds in which the next piece of a message must come, or go, and the greeting.
        idle: Seconds without a message after which a stream is closed; its client opens another when it needs one.
        wire_dtypes: What hidden states may be rounded to.
    """

    message_bytes: int = GIB
    streams: int = 256
    stall: float = 30.0
    idle: float = 3600.0
    wire_dtypes: Sequence[WireDtype] = WIRE_DTYPES


@attrs.define(eq=False)
class Service:
    """What all streams of a server share."""

    handle: Handler
    renew: Renew
    names: SessionNames
    limits: ServerLimits
    watch: Callable[[Served], None] | None
    deadlines: Deadlines
    stopping: bool = False


@attrs.define(eq=False)
class ServedStream:
    """One stream of one client."""

    service: Service
    client: Client
    requests: Iterator[bytes]
    context: Any
    busy: bool = True
    why: str = "the client closed it"
    wire_dtype: WireDtype = "float32"
    _lock: threading.Lock = field(factory=threading.Lock)

    def run(self) -> Iterator[bytes]:
        """Answer the greeting, then one message after the other."""
        limits = self.service.limits
        try:
            first = self._next(limits.stall, "it did not greet in time")
            if first is None:
                return
            yield self._greeting(first)
        except VflairError as error:
            self.why = str(error)
            yield error_frames.error_frame(error)
            return
        while not self.service.stopping:
            self.busy = False
            first = self._next(limits.idle, "it was idle")
            self.busy = True
            if first is None:
                return
            if self.service.stopping:
                yield error_frames.error_frame(ChannelError("The server is stopping."))
                return
            try:
                message = self._read(first)
            except VflairError as error:
                # Where the next message would begin is not known any more.
                self.why = str(error)
                yield error_frames.error_frame(error)
                return
            del first
            yield from self._answered(message)

    def end_if_idle(self) -> None:
        """Close the stream where no message is under way."""
        if not self.busy:
            self.why = "the server is stopping"
            self.context.cancel()

    def _next(self, seconds: float, why: str) -> bytes | None:
        """Return the next frame, or None where no other comes."""
        with self._within(seconds, why):
            return next(self.requests, None)

    def _within(self, seconds: float, why: str) -> AbstractContextManager[None]:
        """Leave the stream if the block takes longer."""

        def give_up() -> None:
            self.why = why
            self.context.cancel()

        return self.service.deadlines.after(seconds, give_up)

    def _greeting(self, frame: bytes) -> bytes:
        here, limits = frames.INSTALLED, self.service.limits
        asked = frames.Hello.read(frame, here=here)
        if asked.wire_dtype not in limits.wire_dtypes:
            raise ProtocolError(
                f"The client asks for wire dtype {asked.wire_dtype!r}; this server takes {', '.join(limits.wire_dtypes)}."
            )
        self.wire_dtype = asked.wire_dtype
        agreed = frames.Hello(here, asked.wire_dtype, message_bytes=limits.message_bytes)
        return agreed.frame()

    def _read(self, first: bytes) -> Message:
        def following() -> Iterator[bytes]:
            yield first
            late = "it stalled in the middle of a message"
            while (frame := self._next(self.service.limits.stall, late)) is not None:
                yield frame

        most = self.service.limits.message_bytes
        pieces = frames.content(following())
        return codec.read(pieces, most=most, wire_dtype=self.wire_dtype)

    def _answered(self, message: Message) -> Iterator[bytes]:
        start, answer, refused = time.perf_counter(), None, None
        try:
            answer = self._answer(message)
        except VflairError as error:
            refused = error
        except Exception:
            log.exception("message_failed", client=self.client.name, kind=message.kind)
            refused = ProtocolError(
                f"The model party failed in carrying out this {message.kind!r}; its log says why."
            )
        self._tell(message, answer, refused, time.perf_counter() - start)
        if answer is None:
            assert refused is not None
            yield error_frames.error_frame(refused)
        else:
            del message
            for piece in frames.pieces(codec.chunks(answer)):
                with self._within(self.service.limits.stall, "it does not take its reply"):
                    yield piece

    def _answer(self, message: Message) -> Message:
        self.client = self.service.renew(self.client)
        self.client.check(message)
        if is_probe(message):
            return to_be_rounded(echo(message), self.wire_dtype)
        names = self.service.names
        if message.kind == "open":
            message = attrs.evolve(message, session=self._opened(message))
        elif not names.owns(self.client.name, message.session):
            raise SessionLostError(
                f"This server knows no session {message.session[:12]!r}… of client {self.client.name!r}: it was opened "
                "elsewhere, by another client, or before the server lost its secret. Open a new one, or resume."
            )
        return to_be_rounded(self.service.handle(message), self.wire_dtype)

    def _opened(self, message: Message) -> str:
        """The name under which a session is opened: the client's own, or one that is issued."""
        names, asked, client = self.service.names, message.session, self.client.name
        if names.owns(client, asked):
            return asked
        if message.meta.get("resume") is not None:
            raise ProtocolError(
                f"Session {asked[:12]!r}… cannot be resumed: this server did not issue it to client {client!r}. Only who "
                "opened a session can go on with it, at a server that has kept its secret."
            )
        if len(asked) > MOST_ASKED:
            raise ProtocolError(f"A session is asked for with at most {MOST_ASKED} characters.")
        return names.issue(client, asked)

    def _tell(
        self, message: Message, answer: Message | None, refused: VflairError | None, seconds: float
    ) -> None:
        if refused is not None:
            log.info(
                "message_refused",
                client=self.client.name,
                kind=message.kind,
                reason=type(refused).__name__,
            )
        if self.service.watch is not None:
            self.service.watch(
                Served(
                    self.client.name,
                    message.session if answer is None else answer.session,
                    message.kind,
                    message.nbytes,
                    0 if answer is None else answer.nbytes,
                    seconds,
                    None if refused is None else type(refused).__name__,
                )
            )
