"""One TLS handshake with a model party, and what went wrong with it in plain words: gRPC itself says little."""

from __future__ import annotations

import socket
import ssl
import time
from contextlib import closing
from pathlib import Path

from attrs import frozen

from vflair_core.communication.remote.tls import Facts, facts_of, import_cryptography
from vflair_core.errors import ChannelError

SECONDS = 5.0  # until a step is given up
# OpenSSL's numbers of what is wrong with a certificate (X509_V_ERR_…).
NOT_YET, EXPIRED, WRONG_HOST, WRONG_ADDRESS = 9, 10, 62, 64
UNKNOWN_AUTHORITY = (2, 7, 18, 19, 20, 21)


@frozen
class Handshake:
    """What a handshake showed."""

    version: str  # of TLS
    certificate: Facts
    seconds: float


def resolve(host: str, port: int) -> list[str]:
    """The addresses of a host.

    Raises:
        ChannelError: It has none.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        raise ChannelError(
            f"The host {host!r} has no address: {error}. Look for a slip in its name, or ask whoever runs the model party "
            "for its address."
        ) from error
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def connect(host: str, port: int, seconds: float = SECONDS) -> socket.socket:
    """Open a connection.

    Raises:
        ChannelError: Nobody listens there, or nothing answers.
    """
    try:
        return socket.create_connection((host, port), seconds)
    except ConnectionRefusedError as error:
        raise ChannelError(
            f"Nobody listens at {host}:{port}. Is `vflair serve` running there, with --listen on this port and on an "
            "address that other machines reach (0.0.0.0 or its own, not 127.0.0.1)?"
        ) from error
    except TimeoutError as error:
        raise ChannelError(
            f"{host}:{port} did not answer in {seconds:g} s. A firewall between here and there drops packets: let "
            f"TCP port {port} through, and look whether the machine is up."
        ) from error
    except OSError as error:
        raise ChannelError(
            f"{host}:{port} cannot be reached: {error.strerror or error}. Look at the network of this machine and the way "
            "there."
        ) from error


def shake_hands(
    host: str,
    port: int,
    *,
    authority: str | Path | None = None,
    certificate: str | Path | None = None,
    key: str | Path | None = None,
    seconds: float = SECONDS,
) -> Handshake:
    """Do as a gRPC client would until TLS stands and the server has taken our certificate.

    Args:
        host: As in the server's certificate.
        port: Where it listens.
        authority: File of the authority that the server's certificate must come from; None takes the system's.
        certificate: Of the client, with its `key`, where the server asks for one.
        key: Of the client's certificate.
        seconds: Until a step is given up.

    Raises:
        ChannelError: There is no connection or no TLS, the certificate is not to be trusted, or ours was not taken.
    """
    import_cryptography()
    from cryptography import x509

    context = ssl.create_default_context(cafile=None if authority is None else str(authority))
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    if certificate is not None:
        context.load_cert_chain(certificate, key)
    start = time.perf_counter()
    with closing(connect(host, port, seconds)) as plain:
        try:
            with context.wrap_socket(plain, server_hostname=host) as secure:
                took = time.perf_counter() - start
                _first_frame(secure, host, port, with_certificate=certificate is not None)
                raw = secure.getpeercert(binary_form=True)
                assert raw is not None
                facts = facts_of(x509.load_der_x509_certificate(raw))
                return Handshake(str(secure.version()), facts, took)
        except ssl.SSLCertVerificationError as error:
            raise ChannelError(_distrust(error, host, port, authority, seconds)) from error
        except (OSError, ssl.SSLError) as error:
            raise ChannelError(_no_tls(error, host, port, certificate is not None)) from error


def greet_in_the_clear(host: str, port: int, seconds: float = SECONDS) -> None:
    """See that what listens speaks HTTP/2 without TLS: a gRPC server says something first then, one with TLS does not.

    Raises:
        ChannelError: It does not.
    """
    with closing(connect(host, port, seconds)) as plain:
        try:
            said = plain.recv(1)
        except OSError:
            said = b""
    if not said:
        raise ChannelError(
            f"What listens at {host}:{port} does not speak without TLS. If it is `vflair serve` with --tls-cert, leave out "
            "plaintext and give --ca."
        )


def _first_frame(secure: ssl.SSLSocket, host: str, port: int, *, with_certificate: bool) -> None:
    """Wait for what a gRPC server says first: in TLS 1.3 only then is it known that it took our certificate."""
    if secure.selected_alpn_protocol() != "h2":
        raise ChannelError(
            f"What listens at {host}:{port} speaks TLS but not HTTP/2, so it is no gRPC server. Is the port that of "
            "`vflair serve`?"
        )
    if not secure.recv(1):
        raise ChannelError(_not_taken(host, port, with_certificate=with_certificate))


def _distrust(
    error: ssl.SSLCertVerificationError,
    host: str,
    port: int,
    authority: str | Path | None,
    seconds: float,
) -> str:
    """Why the server's certificate is not to be trusted, and what to do."""
    facts = _unverified(host, port, seconds)
    theirs = "" if facts is None else f" ({facts.subject}, of {facts.issuer or 'nobody'})"
    match error.verify_code:
        case code if code in (WRONG_HOST, WRONG_ADDRESS):
            names = ", ".join(facts.names) if facts is not None else "other names"
            return (
                f"The model party's certificate is for {names or 'no host'}, not for {host!r}. Connect by one of its "
                f"names, or let its operator make a certificate for this one too: vflair tls init … --host {host}"
            )
        case code if code == EXPIRED:
            when = "" if facts is None else f" on {facts.ends:%Y-%m-%d}"
            return (
                f"The model party's certificate{theirs} has ended{when}. Its operator must make a new one; if it is new, "
                "look at the clock of this machine."
            )
        case code if code == NOT_YET:
            return f"The model party's certificate{theirs} does not hold yet. Look at the clocks of both machines."
        case code if code in UNKNOWN_AUTHORITY and authority is None:
            return (
                f"The model party's certificate{theirs} was not signed by an authority that this system trusts. Give the "
                "certificate of its authority, ca.pem, that its operator handed out."
            )
        case code if code in UNKNOWN_AUTHORITY:
            return (
                f"The model party's certificate{theirs} was not signed by the authority in {authority}. Ask its operator for "
                "the right one; if it is the right one, somebody else is answering."
            )
    return f"The model party's certificate{theirs} is not to be trusted: {error.verify_message}."


def _unverified(host: str, port: int, seconds: float) -> Facts | None:
    """What the server's certificate says, to name it in an error; nothing is sent."""
    from cryptography import x509

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with (
            closing(connect(host, port, seconds)) as plain,
            context.wrap_socket(plain, server_hostname=host) as secure,
        ):
            raw = secure.getpeercert(binary_form=True)
    except (ChannelError, OSError):
        return None
    return None if raw is None else facts_of(x509.load_der_x509_certificate(raw))


def _no_tls(error: OSError, host: str, port: int, with_certificate: bool) -> str:  # noqa: FBT001
    reason = str(getattr(error, "reason", "") or "")
    if isinstance(error, TimeoutError):
        return (
            f"{host}:{port} took the connection and then said nothing. It may not be `vflair serve`, or be hung up: its "
            "operator should look at its log."
        )
    if reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNEXPECTED_MESSAGE"):
        return (
            f"What listens at {host}:{port} does not speak TLS. If it is `vflair serve --insecure-loopback`, use "
            "plaintext (?plaintext=true in the URL); else this is the wrong port."
        )
    if (
        "ALERT" in reason
        or isinstance(error, ConnectionError)
        or reason == "UNEXPECTED_EOF_WHILE_READING"
    ):
        return _not_taken(host, port, with_certificate=with_certificate, reason=reason)
    return f"No TLS with {host}:{port}: {reason or error}."


def _not_taken(host: str, port: int, *, with_certificate: bool, reason: str = "") -> str:
    told = f" ({reason.lower().replace('_', ' ')})" if reason else ""
    if with_certificate:
        return (
            f"The model party at {host}:{port} did not take our certificate{told}. It must come from the authority that the "
            "model party was given as --client-ca, be a client's, and still hold: ask its operator for one."
        )
    return (
        f"The model party at {host}:{port} ended the handshake{told}: it asks for a client's certificate. Give yours and "
        "its key, as `vflair tls client` makes them."
    )
