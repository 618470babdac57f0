"""The model party's half behind TLS, for the length of a run: who may speak to it is told while it serves."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from attrs import define, field, frozen

from vflair_core import (
    Admission,
    ExperimentError,
    IssuedTokens,
    ModelParty,
    ProtocolError,
    Served,
    Server,
    init_authority,
    load_model_party,
    serve,
    tune,
)
from vflair_flower.handover import Handover, client_name
from vflair_flower.options import RunOptions


@frozen
class Identity:
    """What the model party shows of itself: a certificate, its key, and the authority that nodes check it with."""

    certificate: bytes
    key: bytes = field(repr=False)
    authority: bytes

    @classmethod
    def of(cls, options: RunOptions) -> Identity:
        """The operator's certificate, or one of an authority that is made for this run and forgotten at once.

        Raises:
            ExperimentError: A file cannot be read.
            VflairError: The host cannot be in a certificate.
        """
        if options.tls_certificate:
            files = (options.tls_certificate, options.tls_key, options.tls_ca)
            return cls(*(_content(Path(file)) for file in files))
        with tempfile.TemporaryDirectory(prefix="vflair-") as folder:
            init_authority(Path(folder) / "tls", hosts=[options.host], days=7)
            home = Path(folder) / "tls" / "model-party"
            return cls(*(_content(home / n) for n in ("server.pem", "server-key.pem", "ca.pem")))


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ExperimentError(f"{file} cannot be read: {error.strerror}.") from error


@define(eq=False)
class ServedHalf:
    """A model party that serves the nodes of one run. Made by `served`.

    `admit` gives a node its token, `let_go` takes it back and forgets the node's sessions, so that nobody waits for it.
    Silence is judged here and not by the model party (`expiry`): between two messages of Flower a node is silent for good.
    """

    party: ModelParty
    options: RunOptions
    authority: bytes
    tokens: IssuedTokens = field(factory=IssuedTokens)
    server: Server = field(init=False)
    _sessions: dict[str, set[str]] = field(factory=dict)  # by the client's name
    _heard: dict[str, tuple[float, bool]] = field(
        factory=dict
    )  # when, and whether it left in good order
    _lock: threading.Lock = field(factory=threading.Lock)

    def admit(self, node: int) -> Handover:
        """Give a node what it needs to reach the model party in this run."""
        url = f"grpc://{self.options.host}:{self.server.port}"
        return Handover(url, self.authority, self.tokens.issue(client_name(node), ["train"]))

    def let_go(self, node: int) -> None:
        """Withdraw the token of a node, and forget what it has left at the model party."""
        name = client_name(node)
        self.tokens.withdraw(name)
        with self._lock:
            known = self._sessions.pop(name, set())
        for session in known & set(self.party.sessions):
            try:
                self.party.drop(session)
            except ProtocolError:  # it has expired meanwhile
                continue

    def note(self, served: Served) -> None:
        """Remember whose session this is, and when it was heard."""
        with self._lock:
            sessions = self._sessions.setdefault(served.client, set())
            sessions.add(served.session)
            if served.kind == "close":
                sessions.discard(served.session)
            # The last that a node says in a stage; who takes a run up closes the session that it opened to ask for it.
            left = served.kind == "release" or not sessions
            self._heard[served.client] = (time.monotonic(), left)

    def silent(self, node: int, since: float) -> float | None:
        """Seconds for which a node was silent in the middle of its work; None if it has not begun since then."""
        heard, left = self._heard.get(client_name(node), (since, True))
        if heard <= since:
            return None
        return 0.0 if left else time.monotonic() - heard


@contextmanager
def served(options: RunOptions) -> Iterator[ServedHalf]:
    """Load the model party's half and serve it while this lasts; then no token counts any more.

    Raises:
        VflairError: The half cannot be loaded, or the address cannot be listened on.
    """
    import grpc

    identity = Identity.of(options)
    party = load_model_party(options.model, options.cut(), **options.loading())
    tune(party, adapters=options.lora(), seed=options.seed)
    party.model.to(options.device)
    party.sharing = options.sharing
    half = ServedHalf(party, options, identity.authority)
    admission = Admission(half.tokens)
    half.server = serve(
        party.handle,
        options.listen,
        credentials=grpc.ssl_server_credentials([(identity.key, identity.certificate)]),
        authenticate=admission,
        renew=admission.again,
        watch=half.note,
    )
    try:
        yield half
    finally:
        half.server.stop(5)
