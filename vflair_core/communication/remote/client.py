"""The data party's channel to a model party on another machine. It outlives its connection."""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vflair_core.communication.channel import Channel
from vflair_core.communication.message import Message
from vflair_core.communication.remote.addresses import Address
from vflair_core.communication.remote.deadlines import Deadlines
from vflair_core.communication.remote.extra import import_grpc
from vflair_core.communication.remote.failures import Failure
from vflair_core.communication.remote.stream import Lost, Stream, Way
from vflair_core.communication.wire_dtype import WireDtype, check_wire_dtype
from vflair_core.errors import ChannelError, VflairError
from vflair_core.events import events

log = events(__name__)

TIMEOUT = 300.0  # seconds for one reply
GREETING = 20.0  # seconds for a connection and the server's greeting
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 5.0  # seconds between attempts


def connect(
    url: str,
    *,
    ca: str | Path | None = None,
    certificate: str | Path | None = None,
    key: str | Path | None = None,
    token: str | None = None,
    wire_dtype: WireDtype | None = None,
    timeout: float | None = None,
    plaintext: bool = False,
) -> GrpcChannel:
    """Open the way to a model party that `vflair serve` or `serve` holds, and greet it.

    Every option may stand in the URL instead: ``grpc://host:8443?ca=ca.pem&token_file=token&wire_dtype=bfloat16``.

    Args:
        url: ``grpc://HOST:PORT``.
        ca: File with the certificate of the authority that issued the server's; by default those that gRPC knows.
        certificate: File with the client's own certificate, where the server wants one.
        key: File with its private key.
        token: Bearer token that names this client. In a URL it stands in a file, ``token_file``.
        wire_dtype: What hidden states and their gradients are rounded to on their way (``float32``, which rounds nothing,
            ``bfloat16`` or ``int8``).
        timeout: Seconds for one reply, connecting again included.
        plaintext: Do without TLS, to a loopback address.

    Raises:
        ChannelError: There is no way to the server, and why; or an option does not fit.
        ProtocolError: The server speaks another version, or does not take this wire dtype.
    """
    address = Address.of_url(url)
    arguments = {
        "ca": ca,
        "certificate": certificate,
        "key": key,
        "token_file": token,
        "wire_dtype": wire_dtype,
        "timeout": timeout,
        "plaintext": plaintext or None,
    }
    for name in address.options:
        if arguments[name] is not None:
            raise ChannelError(f"{name} is given twice: in the URL, and as an argument.")
    given = {
        name: value for name, value in arguments.items() if value is not None
    } | address.options
    if "token_file" in address.options:
        token = _content("token_file", address.options["token_file"]).decode().strip()
    files = {name: given.get(name) for name in ("ca", "certificate", "key")}
    if token is not None and (not token.isascii() or not token.isprintable()):
        raise ChannelError(
            "A token is one line of printable characters; this one is not. Read it with .strip()."
        )
    grpc = import_grpc()
    way = Way(
        address,
        _credentials(grpc, address, files, plaintext=_truth(given.get("plaintext", False))),
        (("authorization", f"Bearer {token}"),) if token else (),
        check_wire_dtype(str(given.get("wire_dtype", "float32"))),
    )
    return GrpcChannel(grpc, way, _seconds(given.get("timeout", TIMEOUT)))


class GrpcChannel(Channel):
    """A stream to the server, and another when it is lost. Made by `connect`; threads take turns.

    When the connection is lost, the same message is sent again until `timeout` has passed: the model party gives the stored
    reply to a message that it has carried out already.
    """

    lasting = True

    def __init__(self, grpc: Any, way: Way, timeout: float) -> None:
        super().__init__()
        self.wire_dtype = way.wire_dtype
        self.timeout = self.patience = timeout
        self.connections = 0  # streams that were opened so far
        self._grpc, self._way = grpc, way
        self._deadlines = Deadlines("vflair channel deadlines")
        self._lock = threading.RLock()
        self._process = os.getpid()
        self._closed = False
        self._stream: Stream | None = None
        try:
            self._stream = self._opened(min(GREETING, timeout))
        except Lost as lost:
            self._deadlines.close()
            raise self._error(lost.what.reason) from lost
        except BaseException:
            self._deadlines.close()
            raise

    @property
    def server_version(self) -> str:
        """The version of vflair at the server that was reached last."""
        return self._last.vflair

    @property
    def message_bytes(self) -> int:
        """Bytes that the server takes of one message."""
        return self._last.message_bytes

    def deliver(self, message: Message) -> Message:
        with self._lock:
            self._check_usable()
            until = time.monotonic() + self.timeout
            pause, attempts = 0.0, 0
            while True:
                try:
                    return self._attempt(message, until)
                except Lost as lost:
                    what, attempts = lost.what, attempts + 1
                left = until - time.monotonic()
                if what.hopeless or left <= pause:
                    raise self._error(
                        f"{what.reason}. Attempts to send this {message.kind!r}: {attempts}"
                    )
                log.info("connection_lost", server=str(self._way.address), reason=what.reason)
                time.sleep(pause)
                pause = min(LONGEST_PAUSE, 2 * pause or FIRST_PAUSE * random.uniform(0.5, 1.5))  # noqa: S311 - no secret

    def close(self) -> None:
        """Close the connection; the session stays at the model party until it is closed or resumed there."""
        with self._lock:
            self._closed = True
            self._drop()
            self._deadlines.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # While Python ends no other thread runs any more, and gRPC would wait for one of its own.
        leaving = sys.is_finalizing()
        if not leaving and not getattr(self, "_closed", True) and os.getpid() == self._process:
            self.close()

    def __reduce__(self) -> Any:
        raise ChannelError(
            "A channel to another machine cannot be copied or sent to another process: call connect(...) there."
        )

    def _attempt(self, message: Message, until: float) -> Message:
        try:
            left = until - time.monotonic()
            if self._stream is None:
                self._stream = self._opened(min(GREETING, left))
            return self._stream.exchange(message, self.wire_dtype, until - time.monotonic())
        except TimeoutError as late:
            self._drop()
            if time.monotonic() < until:  # it was the greeting
                raise Lost(Failure("it did not answer in time")) from late
            raise self._error(
                f"no reply to this {message.kind!r} came within {self.timeout:g} seconds (timeout)"
            ) from late
        except ChannelError as error:  # the server's: it is stopping
            self._drop()
            raise Lost(Failure(str(error).rstrip("."))) from error
        except VflairError:
            if self._stream is not None and not self._stream.is_whole:
                self._drop()
            raise
        except BaseException:
            self._drop()
            raise

    def _opened(self, seconds: float) -> Stream:
        try:
            stream = Stream(self._grpc, self._way, self._deadlines, seconds)
        except TimeoutError as late:
            raise Lost(Failure(f"it did not answer within {seconds:.3g} seconds")) from late
        self.connections += 1
        self._last = stream.hello
        return stream

    def _drop(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _check_usable(self) -> None:
        if self._closed:
            raise ChannelError(
                f"The channel to {self._way.address} was closed. Call connect(...) again."
            )
        if os.getpid() != self._process:
            raise ChannelError(
                "This process was forked from the one that opened the channel, and gRPC does not survive that. Call "
                "connect(...) in each process."
            )

    def _error(self, reason: str) -> ChannelError:
        return ChannelError(
            f"The model party at {self._way.address} cannot be reached: {reason.removesuffix('.')}."
        )


def _credentials(grpc: Any, address: Address, files: dict[str, Any], *, plaintext: bool) -> Any:
    if plaintext:
        address.check_plaintext()
        if given := [name for name, path in files.items() if path is not None]:
            raise ChannelError(
                f"plaintext=True does without TLS, for which {', '.join(given)} would be. Leave out one of both."
            )
        return None
    if (files["certificate"] is None) != (files["key"] is None):
        raise ChannelError("A client's certificate and its key are given together, or neither.")
    read = {name: path and _content(name, path) for name, path in files.items()}
    return grpc.ssl_channel_credentials(read["ca"], read["key"], read["certificate"])


def _content(name: str, path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ChannelError(f"The file of {name} cannot be read: {error}.") from error


def _truth(value: Any) -> bool:
    if isinstance(value, str):
        if value.lower() not in ("true", "false"):
            raise ChannelError(f"plaintext must be true or false, not {value!r}.")
        return value.lower() == "true"
    return bool(value)


def _seconds(value: Any) -> float:
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ChannelError(f"timeout must be a number of seconds > 0, not {value!r}.")
    return seconds
