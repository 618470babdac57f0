"""Health checks as orchestrators ask for them (`grpc.health.v1`), written by hand: two messages of one field each."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

from vflair_core.communication.remote.extra import import_grpc

SERVICE = "grpc.health.v1.Health"
SERVING, NOT_SERVING, UNKNOWN_SERVICE = 1, 2, 3
KNOWN = ("", "vflair.ModelParty")  # the server as a whole, and its one service
WATCHERS = 4  # at a time, for each takes a thread
LONGEST = 256  # bytes of a request


class Health:
    """Says that the server serves, until it drains."""

    def __init__(self) -> None:
        self._serving = True
        self._change = threading.Condition()
        self._watchers = 0

    def handlers(self) -> Any:
        """What a gRPC server is given beside its own service."""
        grpc = import_grpc()
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Check": grpc.unary_unary_rpc_method_handler(self._check),
                "Watch": grpc.unary_stream_rpc_method_handler(self._watch),
            },
        )

    def drain(self) -> None:
        """Say from now on that the server does not serve any more, and let watchers go."""
        with self._change:
            self._serving = False
            self._change.notify_all()

    @property
    def _status(self) -> int:
        return SERVING if self._serving else NOT_SERVING

    def _check(self, request: bytes, context: Any) -> bytes:
        if _asked(request, context) not in KNOWN:
            context.abort(import_grpc().StatusCode.NOT_FOUND, "There is no such service here.")
        return _answer(self._status)

    def _watch(self, request: bytes, context: Any) -> Iterator[bytes]:
        service = _asked(request, context)
        with self._change:
            full = self._watchers >= WATCHERS
            self._watchers += not full
        if full:
            context.abort(
                import_grpc().StatusCode.RESOURCE_EXHAUSTED,
                f"{WATCHERS} watch already, as many as may; ask with Check.",
            )
        try:
            yield _answer(self._status if service in KNOWN else UNKNOWN_SERVICE)
            context.add_callback(self._wake)
            with self._change:
                while self._serving and context.is_active():
                    self._change.wait()
            if service in KNOWN:
                yield _answer(self._status)
        finally:
            with self._change:
                self._watchers -= 1

    def _wake(self) -> None:
        with self._change:
            self._change.notify_all()


def request_for(service: str) -> bytes:
    """A request for the health of a service, as a client sends it."""
    name = service.encode()
    return b"\x0a" + bytes([len(name)]) + name if name else b""  # field 1, bytes


def status_in(answer: bytes) -> int:
    """The status in an answer, as a client reads it."""
    found = [value for number, value in _fields(answer) if number == 1 and isinstance(value, int)]
    return found[-1] if found else 0


def _answer(status: int) -> bytes:
    return b"\x08" + bytes([status])  # field 1, a number


def _asked(request: bytes, context: Any) -> str:
    """The service in a request; the last one counts, and fields that are unknown do not, as Protocol Buffers have it."""
    try:
        if len(request) > LONGEST:
            raise ValueError(f"{len(request)} bytes")  # noqa: TRY301 - as for what cannot be read
        named = [value for number, value in _fields(request) if number == 1]
        return named[-1].decode() if named else ""  # type: ignore[union-attr]
    except (AttributeError, ValueError):
        context.abort(import_grpc().StatusCode.INVALID_ARGUMENT, "This is no HealthCheckRequest.")
        raise


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message of Protocol Buffers: number and value.

    Raises:
        ValueError: It is none.
    """
    position = 0

    def varint() -> int:
        nonlocal position
        value = 0
        for shift in range(0, 64, 7):
            byte = data[position : position + 1]
            if not byte:
                break
            position += 1
            value |= (byte[0] & 0x7F) << shift
            if byte[0] < 0x80:
                return value
        raise ValueError("a number that does not end")

    def taken(count: int) -> bytes:
        nonlocal position
        if position + count > len(data):
            raise ValueError("a field that does not end")
        position += count
        return data[position - count : position]

    while position < len(data):
        tag = varint()
        match tag & 7:
            case 0:
                yield tag >> 3, varint()
            case 1:
                yield tag >> 3, taken(8)
            case 2:
                yield tag >> 3, taken(varint())
            case 5:
                yield tag >> 3, taken(4)
            case other:
                raise ValueError(f"wire type {other}")
