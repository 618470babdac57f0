"""Figures for Prometheus: what is asked, how long it takes, what is held. Labels come of short lists, never of a peer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, get_args

from vflair_core import errors
from vflair_core.communication.message import Kind
from vflair_core.communication.remote.frames import INSTALLED
from vflair_core.communication.remote.tls import INSTALL
from vflair_core.errors import VflairError

if TYPE_CHECKING:
    from vflair_core.communication.remote.served_stream import Served

KINDS = frozenset(get_args(Kind))
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
REASONS = frozenset(
    name
    for name, thing in vars(errors).items()
    if isinstance(thing, type) and issubclass(thing, VflairError)
)
HELD = {
    "streams": "Streams that are open.",
    "sessions": "Data parties that have a session.",
    "live_graphs": "Forwards that wait for their backward.",
    "caches": "Key-value caches.",
    "certificate_ends": "When the server's certificate ends, in seconds since 1970; 0 without TLS.",
}


class Metrics:
    """What a server does, in figures.

    Args:
        held: How many there are now of each thing in `HELD`; asked at each scrape, and 0 as long as it is not there.

    Raises:
        VflairError: prometheus-client is not installed.
    """

    def __init__(self, held: Mapping[str, Callable[[], float]]) -> None:
        try:
            from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
        except ImportError as error:
            raise VflairError(INSTALL) from error
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"namespace": "vflair", "registry": self.registry}
        self._messages = Counter(
            "messages", "Messages, by kind and by what became of them.", ("kind", "outcome"), **own
        )
        self._bytes = Counter(
            "bytes", "Bytes of tensors, as this server sees their direction.", ("direction",), **own
        )
        self._seconds = Histogram(
            "seconds", "What the model party took for a message.", ("kind",), buckets=SECONDS, **own
        )
        self._refused = Counter(
            "refused", "Messages that were refused, by why.", ("reason",), **own
        )
        self._shut_out = Counter("not_admitted", "Streams of somebody who was not let in.", **own)
        for kind in KINDS:
            for outcome in ("answered", "refused"):
                self._messages.labels(kind, outcome)
            self._seconds.labels(kind)
        for direction in ("received", "sent"):
            self._bytes.labels(direction)
        Gauge("version", "1, for the version of vflair.", ("version",), **own).labels(
            INSTALLED
        ).set(1)
        for name, what in HELD.items():
            Gauge(name, what, **own).set_function(lambda name=name: held.get(name, float)())  # type: ignore[misc]

    def __call__(self, served: Served) -> None:
        """Count a message."""
        outcome = "answered" if served.refused is None else "refused"
        self._messages.labels(served.kind, outcome).inc()
        self._seconds.labels(served.kind).observe(served.seconds)
        self._bytes.labels("received").inc(served.received)
        self._bytes.labels("sent").inc(served.sent)
        if served.refused is not None:
            known = served.refused in REASONS
            self._refused.labels(served.refused if known else "other").inc()

    def not_admitted(self) -> None:
        """Count somebody who was not let in."""
        self._shut_out.inc()

    def listen(self, host: str, port: int) -> tuple[int, Callable[[], None]]:
        """Answer scrapes over HTTP; return the port and what ends it.

        Raises:
            VflairError: The address cannot be listened on.
        """
        from prometheus_client import start_http_server

        try:
            server, thread = start_http_server(port, host, self.registry)
        except OSError as error:
            raise VflairError(
                f"Metrics cannot be served on {host}:{port}: {error.strerror}. Choose another port, or stop what listens there."
            ) from error

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        return server.server_port, stop
