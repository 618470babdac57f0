"""The model party's server: it listens, lets clients in, gives each stream a thread, and stops."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import attrs

from vflair_core.communication import error_frames
from vflair_core.communication.channel import Handler
from vflair_core.communication.remote import frames
from vflair_core.communication.remote.addresses import Address
from vflair_core.communication.remote.deadlines import Deadlines
from vflair_core.communication.remote.extra import import_grpc
from vflair_core.communication.remote.rights import Client
from vflair_core.communication.remote.served_stream import (
    Renew,
    Served,
    ServedStream,
    ServerLimits,
    Service,
)
from vflair_core.communication.remote.session_names import SessionNames
from vflair_core.communication.remote.threads import StreamThreads
from vflair_core.errors import ChannelError, ProtocolError, VflairError
from vflair_core.events import events

log = events(__name__)

Authenticate = Callable[[Mapping[str, str], str | None], Client]
"""Says who a client is, by the metadata of its stream and the name in its certificate; refuses by a `ProtocolError`."""


def serve(
    handle: Handler,
    listen: str,
    *,
    credentials: Any = None,
    plaintext: bool = False,
    authenticate: Authenticate | None = None,
    renew: Renew | None = None,
    secret: bytes | None = None,
    limits: ServerLimits | None = None,
    watch: Callable[[Served], None] | None = None,
    beside: Sequence[Any] = (),
) -> Server:
    """Let data parties on other machines reach a model party, and return the server, which runs until it is stopped.

    Args:
        handle: The model party's `handle`. Streams call it from threads of their own.
        listen: ``HOST:PORT``; port 0 takes a free one (`Server.port`).
        credentials: gRPC's server credentials, made by `grpc.ssl_server_credentials`.
        plaintext: Do without TLS, on a loopback address.
        authenticate: Says who a client is; needed with TLS. Without it, everybody on this machine may do everything.
        renew: Says at each message what a client may do now, who was let in before.
        secret: Binds the names of sessions to clients; with the same one a server that is started anew knows them again.
            By default one that ends with this process.
        limits: What peers are allowed.
        watch: Told of every message that was answered.
        beside: Further generic handlers of gRPC on the same port, e.g. for health checks.

    Raises:
        ChannelError: gRPC is not installed, the address cannot be listened on, or nothing would protect what crosses.
    """
    address = Address.to_listen(listen)
    if plaintext == (credentials is not None):
        raise ChannelError(
            "A server needs either credentials (TLS) or plaintext=True, which is for loopback addresses."
        )
    if plaintext:
        address.check_plaintext()
    elif authenticate is None:
        raise ChannelError(
            "A server that other machines can reach needs authenticate=..., which says who a client is and what it may do."
        )
    known = authenticate or (lambda _metadata, _certificate: Client("local"))
    service = Service(
        handle,
        renew or _as_before,
        SessionNames(secret or os.urandom(32)),
        limits or ServerLimits(),
        watch,
        Deadlines("vflair server deadlines"),
    )
    server = Server(service, address, known)
    server.start(credentials, beside)
    return server


def _as_before(client: Client) -> Client:
    return client


class Server:
    """Made by `serve`. Use it as a context manager, or call `stop`."""

    def __init__(self, service: Service, address: Address, authenticate: Authenticate) -> None:
        self.service, self.address, self.authenticate = service, address, authenticate
        self._streams: set[ServedStream] = set()
        self._change = threading.Condition()
        self._grpc: Any = None
        self._server: Any = None
        self._threads: StreamThreads | None = None

    @property
    def port(self) -> int:
        """Where it listens."""
        return self.address.port

    def start(self, credentials: Any, beside: Sequence[Any]) -> None:
        """Listen."""
        grpc = self._grpc = import_grpc()
        method = grpc.stream_stream_rpc_method_handler(self._serve_stream)  # raw bytes both ways
        service, name = frames.METHOD.strip("/").split("/")
        self._threads = StreamThreads("vflair server")
        self._server = grpc.server(
            self._threads,
            # Some more than streams: what is served beside, and those who are told that there are too many.
            maximum_concurrent_rpcs=self.service.limits.streams + 32,
            handlers=[grpc.method_handlers_generic_handler(service, {name: method}), *beside],
            options=[
                ("grpc.so_reuseport", 0),  # a port that is taken is an error
                ("grpc.max_receive_message_length", frames.PIECE + error_frames.SMALL),
                ("grpc.max_send_message_length", -1),
                ("grpc.keepalive_time_ms", 60_000),
                ("grpc.keepalive_timeout_ms", 20_000),
                ("grpc.http2.max_pings_without_data", 0),
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ],
        )
        try:
            port = (
                self._server.add_insecure_port(str(self.address))
                if credentials is None
                else self._server.add_secure_port(str(self.address), credentials)
            )
        except RuntimeError as error:
            self._threads.shutdown()
            raise ChannelError(
                f"Cannot listen on {self.address}: it is taken, or not an address of this machine. Choose another port, or "
                "stop what listens there."
            ) from error
        self.address = attrs.evolve(self.address, port=port)
        self._server.start()
        log.info("server_started", address=str(self.address), tls=credentials is not None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self, grace: float = 10.0) -> None:
        """Refuse what comes, finish what runs for at most `grace` seconds, and close.

        What is refused is told why, so that its client may try again later or elsewhere.
        """
        with self._change:
            first, self.service.stopping = not self.stopping, True
            for stream in self._streams:
                stream.end_if_idle()
            until = time.monotonic() + grace
            while self._streams and (left := until - time.monotonic()) > 0:
                self._change.wait(left)
            cut = len(self._streams)
        if first and self._server is not None:
            self._server.stop(None).wait()
            self.service.deadlines.close()
            if self._threads is not None:
                self._threads.shutdown(wait=not cut)
            log.info("server_stopped", address=str(self.address), cut_off=cut)

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until the server was stopped; return whether it was."""
        return not self._server.wait_for_termination(seconds)

    @property
    def stopping(self) -> bool:
        """Whether it was told to stop."""
        return self.service.stopping

    @property
    def streams(self) -> int:
        """Streams that are open now."""
        return len(self._streams)

    # -- a stream, in a thread of its own ---------------------------------------------------------------

    def _serve_stream(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        client = self._admitted(context)
        stream = ServedStream(self.service, client, requests, context)
        with self._change:
            refused = self._reason_to_refuse()
            if refused is None:
                self._streams.add(stream)
        if refused is not None:
            context.abort(*refused)
        log.info("stream_opened", client=client.name, peer=context.peer())
        try:
            yield from stream.run()
        except self._grpc.RpcError:
            pass  # the peer is gone, or was left: `why` says it
        except Exception:
            log.exception("stream_failed", client=client.name)
            yield error_frames.error_frame(ProtocolError("The server failed; its log says why."))
        finally:
            with self._change:
                self._streams.discard(stream)
                self._change.notify_all()
            log.info("stream_closed", client=client.name, why=stream.why)

    def _reason_to_refuse(self) -> tuple[Any, str] | None:
        code = self._grpc.StatusCode
        if self.stopping:
            return code.UNAVAILABLE, "The server is stopping."
        if len(self._streams) >= self.service.limits.streams:
            return (
                code.RESOURCE_EXHAUSTED,
                f"The server has {self.service.limits.streams} streams open, as many as it may.",
            )
        return None

    def _admitted(self, context: Any) -> Client:
        metadata = {
            key: value for key, value in context.invocation_metadata() if isinstance(value, str)
        }
        certificate = context.auth_context().get("x509_common_name", [None])[0]
        try:
            return self.authenticate(metadata, certificate and certificate.decode())
        except VflairError as error:
            log.warning("client_refused", peer=context.peer(), reason=str(error))
            context.abort(
                self._grpc.StatusCode.UNAUTHENTICATED, str(error)[: error_frames.LONGEST_TEXT]
            )
        except Exception:
            log.exception("authentication_failed", peer=context.peer())
            context.abort(
                self._grpc.StatusCode.INTERNAL, "The server could not find out who this client is."
            )
        raise AssertionError  # `abort` raises
