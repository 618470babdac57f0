"""Certificates and keys as they lie on disk: read, and refused in plain words before a connection is tried."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from attrs import frozen

from vflair_core.communication.remote.clients import check_private
from vflair_core.communication.remote.extra import import_grpc
from vflair_core.errors import VflairError

if TYPE_CHECKING:
    from cryptography import x509

Purpose = Literal["server", "client"]
SOON = 30  # days before the end of a certificate from which on it is worth a word
INSTALL = "vflair on two machines needs more packages: python -m pip install 'vflair-core[grpc]'"


@frozen
class Identity:
    """A certificate, with those that lead from it to an authority, and its key, as PEM."""

    certificate: bytes
    key: bytes


@frozen
class Facts:
    """What is to be said of a certificate."""

    subject: str
    names: tuple[str, ...]  # hosts and addresses that it is for
    issuer: str
    begins: dt.datetime
    ends: dt.datetime

    @property
    def days_left(self) -> int:
        """Whole days until it ends; negative if it has."""
        return (self.ends - dt.datetime.now(dt.UTC)).days


def read_identity(certificate: str | Path, key: str | Path, purpose: Purpose) -> Identity:
    """Read a certificate and its key.

    Raises:
        VflairError: A file is missing or is something else, the key is open to others or belongs to another certificate,
            or the certificate does not hold now or is not for this purpose.
    """
    import_cryptography()
    from cryptography.hazmat.primitives import serialization

    chain = _read_certificates(Path(certificate))
    check_private(Path(key), "The key")
    data = Path(key).read_bytes()
    try:
        private = serialization.load_pem_private_key(data, None)
    except TypeError as error:
        raise VflairError(
            f"The key {key} has a passphrase, and nobody is here to type it. Write it without: "
            f"openssl pkey -in {key} -out NEW-KEY.pem"
        ) from error
    except ValueError as error:
        raise VflairError(f"{key} holds no private key in PEM: {_reason(error)}") from error
    if private.public_key() != chain[0].public_key():
        raise VflairError(
            f"The key {key} does not belong to the certificate {certificate}. Give the two that were made together."
        )
    _check_dates(chain[0], Path(certificate))
    _check_purpose(chain[0], Path(certificate), purpose)
    return Identity(Path(certificate).read_bytes(), data)


def read_authority(file: str | Path) -> bytes:
    """Read the certificates of one or more authorities.

    Raises:
        VflairError: The file is missing, is something else, or none of them is an authority that holds now.
    """
    import_cryptography()
    from cryptography import x509

    path = Path(file)
    found = _read_certificates(path)
    for certificate in found:
        try:
            basic = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
        except x509.ExtensionNotFound:
            continue
        if basic.value.ca:
            _check_dates(certificate, path)
            return path.read_bytes()
    raise VflairError(
        f"{path} holds no authority: its certificate ({facts_of(found[0]).subject}) cannot sign others. Give the "
        "authority's certificate, in a folder of `vflair tls init` the file ca.pem."
    )


class Renewed:
    """What a server is opened with, which may be renewed while it serves.

    Args:
        certificate: File of the server's certificate.
        key: File of its key.
        authority: File of the authority that clients' certificates must come from; None asks for none.

    Raises:
        VflairError: As `read_identity` and `read_authority`.
    """

    def __init__(
        self, certificate: str | Path, key: str | Path, authority: str | Path | None
    ) -> None:
        self._files = (certificate, key, authority)
        self._now = self._read()
        self._new = False

    @property
    def facts(self) -> Facts:
        """What is to be said of the certificate that is in use."""
        return self._facts

    def ends(self) -> float:
        """When the certificate that is in use ends, in seconds since 1970."""
        return self._facts.ends.timestamp()

    def credentials(self) -> Any:
        """Credentials of gRPC, which look at each handshake whether there is something new."""
        grpc = import_grpc()
        asks = self._files[2] is not None
        return grpc.dynamic_ssl_server_credentials(self._now, self._fetch, asks)

    def read_again(self) -> None:
        """Read the files again; handshakes from now on go by them.

        Raises:
            VflairError: As when they were read first; those of before stay.
        """
        self._now = self._read()
        self._new = True

    def _read(self) -> Any:
        certificate, key, authority = self._files
        identity = read_identity(certificate, key, "server")
        root = None if authority is None else read_authority(authority)
        self._facts = read_facts(certificate)
        return import_grpc().ssl_server_certificate_configuration(
            [(identity.key, identity.certificate)], root
        )

    def _fetch(self) -> Any:
        if not self._new:
            return None
        self._new = False
        return self._now


def read_facts(file: str | Path) -> Facts:
    """What is to be said of the first certificate in a file.

    Raises:
        VflairError: There is none.
    """
    import_cryptography()
    return facts_of(_read_certificates(Path(file))[0])


def facts_of(certificate: x509.Certificate) -> Facts:
    """What is to be said of a certificate."""
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    def named(name: x509.Name) -> str:
        common = name.get_attributes_for_oid(NameOID.COMMON_NAME)
        return str(common[0].value) if len(common) == 1 else ""

    try:
        alternative = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        hosts = alternative.value.get_values_for_type(x509.DNSName)
        addresses = alternative.value.get_values_for_type(x509.IPAddress)
        names = (*hosts, *(str(address) for address in addresses))
    except x509.ExtensionNotFound:
        names = ()
    return Facts(
        named(certificate.subject),
        names,
        named(certificate.issuer),
        certificate.not_valid_before_utc,
        certificate.not_valid_after_utc,
    )


def import_cryptography() -> None:
    """See that the package is there.

    Raises:
        VflairError: It is not installed.
    """
    try:
        import cryptography  # noqa: F401 - only whether it is there
    except ImportError as error:
        raise VflairError(INSTALL) from error


def _read_certificates(path: Path) -> list[x509.Certificate]:
    from cryptography import x509

    try:
        data = path.read_bytes()
    except OSError as error:
        raise VflairError(f"The certificate cannot be read: {path}: {error.strerror}.") from error
    try:
        return x509.load_pem_x509_certificates(data)
    except ValueError as error:
        what = "a private key" if b"PRIVATE KEY-----" in data else "something else"
        raise VflairError(f"{path} holds no certificate in PEM, but {what}.") from error


def _check_dates(certificate: x509.Certificate, path: Path) -> None:
    facts, now = facts_of(certificate), dt.datetime.now(dt.UTC)
    if now > facts.ends:
        raise VflairError(
            f"The certificate {path} ({facts.subject}) ended on {facts.ends:%Y-%m-%d}. Make a new one."
        )
    if now < facts.begins:
        raise VflairError(
            f"The certificate {path} ({facts.subject}) begins on {facts.begins:%Y-%m-%d %H:%M} UTC, and it is "
            f"{now:%Y-%m-%d %H:%M} here. Set the clock, or wait."
        )


def _check_purpose(certificate: x509.Certificate, path: Path, purpose: Purpose) -> None:
    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID

    wanted = {
        "server": ExtendedKeyUsageOID.SERVER_AUTH,
        "client": ExtendedKeyUsageOID.CLIENT_AUTH,
    }[purpose]
    try:
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return  # it is for everything
    if wanted not in usage and ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE not in usage:
        other = "client" if purpose == "server" else "server"
        raise VflairError(
            f"The certificate {path} is not a {purpose}'s, but a {other}'s or for something else. Give one with the "
            f"extended key usage {purpose}Auth."
        )


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:120]
