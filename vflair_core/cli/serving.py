"""A model party that serves until it is told to stop: what is read and made before, what signals do, and how it ends."""

from __future__ import annotations

import os
import queue
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import field, frozen

from vflair_core.communication.remote.addresses import Address
from vflair_core.communication.remote.admission import Admission
from vflair_core.communication.remote.audit import Audit
from vflair_core.communication.remote.clients import Clients, check_private
from vflair_core.communication.remote.health import Health
from vflair_core.communication.remote.metrics import Metrics
from vflair_core.communication.remote.tls import SOON, Renewed
from vflair_core.errors import VflairError
from vflair_core.events import events

if TYPE_CHECKING:
    from vflair_core.communication.remote.served_stream import Served, ServerLimits
    from vflair_core.communication.remote.server import Server
    from vflair_core.parties.model_party.party import ModelParty

log = events(__name__)
STOP = (signal.SIGTERM, signal.SIGINT)
SECRET = "session-secret"  # noqa: S105 - a file's name
Read = Callable[[], None]  # what is read again on SIGHUP


@frozen
class Terms:
    """On what terms a model party is served: all that is read before its weights are."""

    address: Address
    credentials: Any = None  # gRPC's; None is plaintext
    admission: Admission = field(factory=lambda: Admission(None, certificates=False))
    audit: Audit | None = None
    metrics: Metrics | None = None
    metrics_at: Address | None = None
    again: tuple[Read, ...] = ()
    held: dict[str, Callable[[], float]] = field(factory=dict)  # more, once there is a party


@frozen
class Ending:
    """How it ended: streams that were cut off, and whether a second signal did it."""

    cut_off: int
    told_twice: bool


def read_terms(
    listen: str,
    *,
    tls_cert: Path | None,
    tls_key: Path | None,
    client_ca: Path | None,
    tokens: Path | None,
    insecure_loopback: bool,
    audit: Path | None,
    metrics: str | None,
) -> Terms:
    """Read certificates, clients and addresses, and open what is written.

    Raises:
        VflairError: They do not fit, or would leave what crosses or the model party unprotected.
    """
    address = Address.to_listen(listen)
    again: list[Read] = []
    held: dict[str, Callable[[], float]] = {}
    credentials = None
    if insecure_loopback:
        if given := [
            name
            for name, path in (
                ("--tls-cert", tls_cert),
                ("--tls-key", tls_key),
                ("--client-ca", client_ca),
            )
            if path is not None
        ]:
            raise VflairError(
                f"--insecure-loopback does without TLS, for which {', '.join(given)} would be. Leave out one of both."
            )
        address.check_plaintext()
    else:
        if tls_cert is None or tls_key is None:
            raise VflairError(
                "Give --tls-cert and --tls-key; `vflair tls init DIR` makes both for a trial. Without TLS everybody on the "
                "way could read what crosses; on one machine, --insecure-loopback does without."
            )
        if client_ca is None and tokens is None:
            raise VflairError(
                "Say who may use the model party: --tokens FILE (`vflair token new NAME` makes a line of it), --client-ca "
                "FILE, or, better, both."
            )
        renewed = Renewed(tls_cert, tls_key, client_ca)
        credentials = renewed.credentials()
        again.append(renewed.read_again)
        held["certificate_ends"] = renewed.ends
        if renewed.facts.days_left < SOON:
            log.warning("certificate_ends_soon", days=renewed.facts.days_left)
    clients = None if tokens is None else Clients(tokens)
    if clients is not None:
        again.append(clients.reload)
    metrics_at = None if metrics is None else Address.to_listen(metrics)
    for one in (address, metrics_at):
        if one is not None:
            _check_free(one)
    figures = None if metrics_at is None else Metrics(held)
    book = None if audit is None else Audit(audit)
    if book is not None:
        again.append(book.reopen)

    def refused(certificate: str | None, reason: str) -> None:
        if book is not None:
            book.not_admitted(certificate, reason)
        if figures is not None:
            figures.not_admitted()

    admission = Admission(clients, client_ca is not None, refused)
    return Terms(address, credentials, admission, book, figures, metrics_at, tuple(again), held)


def _check_free(address: Address) -> None:
    """See that an address can be listened on, before minutes are spent on a model."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        socket.create_server((address.host, address.port), family=family).close()
    except OSError as error:
        raise VflairError(
            f"Cannot listen on {address}: {error.strerror or error}. It is taken, or no address of this machine. Choose "
            "another, or stop what listens there."
        ) from error


def serve_until_stopped(
    party: ModelParty,
    terms: Terms,
    limits: ServerLimits,
    *,
    drain: float,
    ready: Callable[[Server], None],
) -> Ending:
    """Serve `party` until SIGTERM or SIGINT, then let what runs come to its end, and say how it ended.

    SIGHUP reads certificates and clients again and opens the audit anew. A second signal to stop cuts off what still runs.

    Args:
        party: The model party.
        terms: Who may do what, and what is written of it.
        limits: What peers are allowed.
        drain: Seconds for what runs.
        ready: Called when the server listens.

    Raises:
        VflairError: The address cannot be listened on.
    """
    from vflair_core.communication.remote.server import serve

    health = Health()
    with ExitStack() as stack:
        signals = stack.enter_context(_signals())
        server = serve(
            party.handle,
            str(terms.address),
            credentials=terms.credentials,
            plaintext=terms.credentials is None,
            authenticate=terms.admission,
            renew=terms.admission.again,
            secret=_secret(party.checkpoints),
            limits=limits,
            watch=_watcher(terms),
            beside=[health.handlers()],
        )
        stack.callback(server.stop, 0)
        if terms.audit is not None:
            stack.callback(terms.audit.close)
        terms.held.update(_held(party, server))
        if terms.metrics is not None and terms.metrics_at is not None:
            port, stop = terms.metrics.listen(terms.metrics_at.host, terms.metrics_at.port)
            stack.callback(stop)
            log.info("metrics_served", address=f"{terms.metrics_at.host}:{port}")
        ready(server)
        while (number := signals.get()) not in STOP:
            _read_again(terms)
        log.info("draining", signal=signal.Signals(number).name, seconds=drain)
        health.drain()
        told_twice = not _drained(server, drain, signals)
        return Ending(server.streams, told_twice)


def _drained(server: Server, seconds: float, signals: queue.SimpleQueue[int]) -> bool:
    """Stop a server; a second signal ends the waiting. Return whether it did not."""
    over = threading.Event()

    def stop() -> None:
        server.stop(seconds)
        over.set()

    threading.Thread(target=stop, name="drain", daemon=True).start()
    while not over.is_set():
        try:
            if signals.get(timeout=0.05) in STOP:
                log.warning("cut_off", streams=server.streams)
                return False
        except queue.Empty:
            continue
    return True


@contextmanager
def _signals() -> Iterator[queue.SimpleQueue[int]]:
    """Signals as they come, instead of what they do else."""
    came: queue.SimpleQueue[int] = queue.SimpleQueue()  # its `put` may interrupt itself
    numbers = (*STOP, signal.SIGHUP)
    before = {number: signal.signal(number, lambda n, _frame: came.put(n)) for number in numbers}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _read_again(terms: Terms) -> None:
    """Read again what may have changed; what cannot be read stays as it was."""
    for read in terms.again:
        try:
            read()
        except VflairError as error:
            log.warning("not_read_again", why=str(error))
    log.info("read_again")


def _watcher(terms: Terms) -> Callable[[Served], None]:
    told = [each for each in (terms.audit, terms.metrics) if each is not None]

    def watch(served: Served) -> None:
        for each in told:
            each(served)

    return watch


def _held(party: ModelParty, server: Server) -> dict[str, Callable[[], float]]:
    def sessions() -> list[Any]:
        return list(party.sessions.values())

    return {
        "streams": lambda: server.streams,
        "sessions": lambda: len(party.sessions),
        "live_graphs": lambda: sum(len(session.graphs) for session in sessions()),
        "caches": lambda: sum(len(session.caches) for session in sessions()),
    }


def _secret(checkpoints: str | Path | None) -> bytes | None:
    """What binds sessions to clients: kept beside checkpoints, so that they can be resumed after a new start."""
    if checkpoints is None:
        return None
    file = Path(checkpoints) / SECRET
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        check_private(file, "The secret of sessions")
        secret = file.read_bytes()
        if len(secret) != 32:
            raise VflairError(
                f"{file} is not what vflair wrote there. Move it away: a new one is made, and runs of before cannot be "
                "resumed by their clients."
            ) from None
        return secret
    with os.fdopen(descriptor, "wb") as stream:
        secret = os.urandom(32)
        stream.write(secret)
    return secret
