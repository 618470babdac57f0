"""The client's end of one stream: greeted when it is there, and of no use any more after the first failure."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from attrs import field, frozen

from vflair_core.communication import codec, error_frames
from vflair_core.communication.message import Message
from vflair_core.communication.remote import frames
from vflair_core.communication.remote.addresses import Address
from vflair_core.communication.remote.deadlines import Deadlines
from vflair_core.communication.remote.failures import Failure, failure
from vflair_core.communication.wire_dtype import WireDtype
from vflair_core.errors import ProtocolError

HEADER_ROOM = (
    2**16
)  # bytes of a message that may be no tensors, when its size is compared with what the server takes


class Lost(Exception):  # noqa: N818 - a turn of events, that `GrpcChannel` deals with
    """The stream is gone, and nobody knows what became of the message that was under way."""

    def __init__(self, what: Failure) -> None:
        super().__init__(what.reason)
        self.what = what


@frozen(eq=False)
class Way:
    """How a server is reached."""

    address: Address
    credentials: Any  # of gRPC; None is plaintext
    metadata: tuple[tuple[str, str], ...] = field(repr=False)
    wire_dtype: WireDtype


class Stream:
    """One bidirectional stream, greeted by both sides.

    Args:
        grpc: The module.
        way: To the server.
        deadlines: Watches over what takes too long.
        seconds: In which the server must have answered the greeting.

    Raises:
        Lost: It could not be opened.
        ProtocolError: The server refuses the version or the wire dtype.
    """

    def __init__(self, grpc: Any, way: Way, deadlines: Deadlines, seconds: float) -> None:
        self._grpc, self._deadlines = grpc, deadlines
        self._tls = way.credentials is not None
        self._late = False
        self.is_whole = True  # whether the next frame would be the first of a message
        self._outgoing: queue.SimpleQueue[Iterable[bytes] | None] = queue.SimpleQueue()
        self._channel = _open_channel(grpc, way)
        self._call = self._channel.stream_stream(frames.METHOD)(
            self._requests(), metadata=way.metadata
        )
        try:
            self.hello = self._greeted(way.wire_dtype, seconds)
        except BaseException:
            self.close()
            raise

    def _greeted(self, wire_dtype: WireDtype, seconds: float) -> frames.Hello:
        here = frames.INSTALLED
        self._outgoing.put((frames.Hello(here, wire_dtype).frame(),))
        reply = self._guarded(self._next, seconds)
        if reply[:1] == error_frames.ERROR:
            raise error_frames.read_error(reply)
        hello = frames.Hello.read(reply, here=here)
        if hello.wire_dtype != wire_dtype:
            raise ProtocolError(
                f"This side asked for wire dtype {wire_dtype!r}, and the server agreed to {hello.wire_dtype!r}."
            )
        return hello

    def exchange(self, message: Message, wire_dtype: WireDtype, seconds: float) -> Message:
        """Send `message` and return the reply.

        Raises:
            Lost: The stream broke.
            TimeoutError: No reply came in `seconds`.
            VflairError: What the model party refused `message` with.
        """
        if message.nbytes + HEADER_ROOM > max(self.hello.message_bytes, HEADER_ROOM):
            raise ProtocolError(
                f"This {message.kind!r} has {message.nbytes} bytes, and the server takes messages of at most "
                f"{self.hello.message_bytes}, with their headers. Send smaller batches or shorter texts, or ask its operator "
                "for more (message_bytes)."
            )
        chunks = codec.chunks(message)
        header = next(chunks)  # what cannot be written is refused here

        def outgoing() -> Iterator[bytes | memoryview]:
            yield header
            yield from chunks

        self._outgoing.put(frames.pieces(outgoing()))
        return self._guarded(lambda: self._reply(wire_dtype), seconds)

    def _reply(self, wire_dtype: WireDtype) -> Message:
        first = self._next()
        if first[:1] == error_frames.ERROR:
            raise error_frames.read_error(first)
        self.is_whole = False  # until all of the reply has come

        def incoming() -> Iterator[bytes]:
            yield first
            while True:
                yield self._next()

        reply = codec.read(frames.content(incoming()), wire_dtype=wire_dtype)
        self.is_whole = True
        return reply

    def close(self) -> None:
        """Let go of the stream and of its connection."""
        self._outgoing.put(None)
        self._call.cancel()
        self._channel.close()

    def _guarded(self, act: Callable[[], Any], seconds: float) -> Any:
        def give_up() -> None:
            self._late = True
            self._call.cancel()

        with self._deadlines.after(seconds, give_up):
            try:
                return act()
            except self._grpc.RpcError as error:
                if self._late:
                    raise TimeoutError from error
                raise Lost(failure(self._grpc, error, tls=self._tls)) from error

    def _next(self) -> bytes:
        frame: bytes | None = next(self._call, None)
        if frame is None:
            raise Lost(Failure("it closed the stream"))
        return frame

    def _requests(self) -> Iterator[bytes]:
        """What is sent, as gRPC asks for it, in a thread of gRPC's."""
        while (frames_of_one := self._outgoing.get()) is not None:
            yield from frames_of_one


def _open_channel(grpc: Any, way: Way) -> Any:
    options = [
        ("grpc.max_receive_message_length", frames.PIECE + error_frames.SMALL),
        ("grpc.max_send_message_length", -1),
        ("grpc.use_local_subchannel_pool", 1),  # nothing is left of a connection that was lost
        ("grpc.enable_retries", 0),  # a stream with state is not gRPC's to repeat
        ("grpc.enable_http_proxy", 0 if way.address.is_loopback else 1),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.max_pings_without_data", 0),
    ]
    if way.credentials is None:
        return grpc.insecure_channel(str(way.address), options)
    return grpc.secure_channel(str(way.address), way.credentials, options)
