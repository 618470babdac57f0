"""What gRPC reports when a stream could not be opened or was lost, in plain words: what it means, and what to do."""

from __future__ import annotations

from typing import Any

from attrs import frozen


@frozen
class Failure:
    """Why there is no stream; `hopeless` where trying again would end in the same way."""

    reason: str
    hopeless: bool = False


# What the details of a status hold, and what that means; the first that fits.
_MEANINGS: dict[tuple[str, ...], Failure] = {
    ("certificate has expired", "certificate is not yet valid"): Failure(
        "its certificate has run out, or does not hold yet. Its operator needs a new one; see that the clocks of both "
        "machines are right",
        hopeless=True,
    ),
    ("CERTIFICATE_VERIFY_FAILED", "certificate verify failed", "self signed"): Failure(
        "its certificate was not issued by an authority that is trusted here. Pass ca=... with the certificate of the "
        "authority that issued it",
        hopeless=True,
    ),
    ("is not in peer certificate", "Hostname Verification"): Failure(
        "its certificate is for another name. Connect to a name that the certificate has, or have one issued for this name",
        hopeless=True,
    ),
    ("WRONG_VERSION_NUMBER", "wrong version number", "HTTP_REQUEST"): Failure(
        "it does not speak TLS. If it is on this machine and meant to, pass plaintext=True",
        hopeless=True,
    ),
    ("Failed to create security handshaker",): Failure(
        "the files of ca, certificate and key cannot be used. See that each is PEM, and that the key is the certificate's",
        hopeless=True,
    ),
    ("handshake failed", "Handshake read failed"): Failure(
        "the TLS handshake failed. See that both sides use TLS, that ca=... is the authority of the server, and that the "
        "certificates have not run out"
    ),
    ("DNS resolution failed", "Domain name not found", "C-ares"): Failure(
        "its name cannot be resolved. Check how the host is spelt, and that this machine has a working DNS"
    ),
    ("Connection refused",): Failure(
        "nothing listens there. Check the port, and that the server runs"
    ),
    ("No route to host", "Network is unreachable"): Failure(
        "there is no way to that network from here. Check the address, the route and firewalls"
    ),
    ("Connection timed out", "FD Shutdown", "connect timed out"): Failure(
        "it does not answer: a firewall may drop what is sent there, or the machine is down"
    ),
}
# What is left of a handshake that the server broke off: it does not say why.
_BROKEN_OFF = ("failed to connect", "Socket closed")
_BROKEN_OFF_IN_THE_CLEAR = Failure(
    "it closed the connection at once. It may speak TLS: leave plaintext out, and pass ca=..."
)
_BROKEN_OFF_TLS = Failure(
    "it broke off the TLS handshake. It may want a certificate of the client, of an authority that it trusts: pass "
    "certificate=... and key=..., or others"
)


def failure(grpc: Any, error: Any, *, tls: bool) -> Failure:
    """Say what an error of gRPC means, on a stream with TLS or without."""
    code, details = error.code(), str(error.details() or "")
    status = grpc.StatusCode
    if code in (status.UNAUTHENTICATED, status.PERMISSION_DENIED):
        return Failure(f"it does not let this client in: {details.rstrip('.')}", hopeless=True)
    if code is status.UNIMPLEMENTED:
        return Failure(
            "what listens there is no server of vflair, or one of another version", hopeless=True
        )
    if code is status.INTERNAL and "could not find out" in details:
        return Failure(f"it does not let this client in: {details.rstrip('.')}", hopeless=True)
    for signs, meaning in _MEANINGS.items():
        if any(sign in details for sign in signs):
            return meaning
    if all(sign in details for sign in _BROKEN_OFF):
        return _BROKEN_OFF_TLS if tls else _BROKEN_OFF_IN_THE_CLEAR
    if code is status.CANCELLED:
        return Failure("it closed the stream")
    return Failure(f"{code.name.lower().replace('_', ' ')}: {details[:300]}")
