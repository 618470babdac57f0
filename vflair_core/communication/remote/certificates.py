"""A certificate authority for trying things out, and the certificates that it signs: one folder for each machine.

Elliptic curve P-256. A server's certificate cannot be used as a client's, nor the other way round.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import frozen

from vflair_core.communication.remote.clients import check_name
from vflair_core.errors import VflairError

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

HOSTS = ("localhost", "127.0.0.1", "::1")
YEARS = 5  # that the authority holds
DAYS = 365  # that a certificate of it holds
SKEW = dt.timedelta(minutes=5)  # clocks of two machines differ

AUTHORITY, MODEL_PARTY, CLIENTS = "authority", "model-party", "clients"


@frozen
class Written:
    """A file that was written, and what it is for."""

    path: Path
    what: str


def init_authority(
    folder: str | Path,
    *,
    hosts: Sequence[str] = HOSTS,
    clients: Sequence[str] = (),
    days: int = DAYS,
) -> list[Written]:
    """Make an authority, the certificate of a model party and one for each client; nothing is overwritten.

    Args:
        folder: Where; it must not exist, or be empty.
        hosts: Names and addresses by which data parties reach the model party.
        clients: Names of data parties.
        days: How long certificates hold.

    Raises:
        VflairError: The folder holds something, or a host or a name cannot be one.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise VflairError(
            f"{target} exists already, and nothing is overwritten. Give a new folder, or add a client to this one with "
            f"`vflair tls client {target} NAME`."
        )
    for name in clients:
        check_name(name)
    if len(set(clients)) < len(clients):
        raise VflairError(f"Each client needs a name of its own, not {', '.join(clients)}.")
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    _folder(aside)
    try:
        written = _authority(aside) + _server(aside, hosts, days)
        for name in clients:
            written += _client(aside, name, days)
        aside.replace(target)
    except BaseException:
        shutil.rmtree(aside)
        raise
    return [Written(target / each.path.relative_to(aside), each.what) for each in written]


def add_client(folder: str | Path, name: str, *, days: int = DAYS) -> list[Written]:
    """Make a certificate for one more client of the authority in `folder`.

    Raises:
        VflairError: There is no authority, the client has a certificate already, or the name cannot be one.
    """
    check_name(name)
    source = Path(folder)
    if not (source / AUTHORITY / "ca-key.pem").is_file():
        raise VflairError(f"{source} holds no authority. Make one: `vflair tls init {source}`.")
    target = source / CLIENTS / name
    if target.exists():
        raise VflairError(
            f"{target} exists already, and nothing is overwritten. Take another name, or move that folder away first."
        )
    return _client(source, name, days)


def _authority(folder: Path) -> list[Written]:
    from cryptography import x509

    key = _new_key()
    name = _named("vflair trial authority", unique=True)
    usage = _usage(signs_certificates=True)
    certificate = _builder(name, name, key.public_key(), YEARS * 365).add_extension(
        x509.BasicConstraints(ca=True, path_length=0), critical=True
    )
    certificate = certificate.add_extension(usage, critical=True)
    home = _folder(folder / AUTHORITY)
    return [
        _write(
            home / "ca-key.pem",
            _key_bytes(key),
            "the authority's key: signs certificates, stays here",
        ),
        _write(
            home / "ca.pem",
            _bytes(_signed(certificate, key, key.public_key())),
            "the authority's certificate; each machine has a copy in its folder",
        ),
    ]


def _server(folder: Path, hosts: Sequence[str], days: int) -> list[Written]:
    from cryptography.x509.oid import ExtendedKeyUsageOID

    alternative = [_host(host) for host in hosts]
    if not alternative:
        raise VflairError("Name at least one host by which data parties reach the model party.")
    home = _folder(folder / MODEL_PARTY)
    return _issue(
        *(folder, home, "server", "vflair model party", days),
        ExtendedKeyUsageOID.SERVER_AUTH,
        alternative,
    )


def _client(folder: Path, name: str, days: int) -> list[Written]:
    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID

    home = folder / CLIENTS
    if not home.exists():
        _folder(home)
    return _issue(
        *(folder, _folder(home / name), "client", name, days),
        ExtendedKeyUsageOID.CLIENT_AUTH,
        [x509.DNSName(name)],
    )


def _issue(
    folder: Path,
    home: Path,
    stem: str,
    name: str,
    days: int,
    purpose: x509.ObjectIdentifier,
    alternative: Sequence[x509.GeneralName],
) -> list[Written]:
    """Write a key, its certificate, and a copy of the authority's into the folder of one machine."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    if days < 1:
        raise VflairError(f"A certificate must hold at least a day, not {days}.")
    root = (folder / AUTHORITY / "ca.pem").read_bytes()
    authority = x509.load_pem_x509_certificate(root)
    signing = load_pem_private_key((folder / AUTHORITY / "ca-key.pem").read_bytes(), None)
    left = authority.not_valid_after_utc - _now()
    if left < dt.timedelta(days=days):
        raise VflairError(
            f"The authority in {folder} holds for {left.days} more days and cannot sign for {days}. "
            "Make a new one, or pass fewer --days."
        )
    key = _new_key()
    certificate = (
        _builder(_named(name), authority.subject, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(x509.SubjectAlternativeName(alternative), critical=False)
    )
    signed = _signed(certificate, signing, authority.public_key())  # type: ignore[arg-type]
    whose = "the model party's" if stem == "server" else f"{name}'s"
    other = "data parties' certificates" if stem == "server" else "the model party's certificate"
    return [
        _write(home / f"{stem}-key.pem", _key_bytes(key), f"{whose} key; on its own machine only"),
        _write(home / f"{stem}.pem", _bytes(signed), f"{whose} certificate"),
        _write(home / "ca.pem", root, f"what it checks {other} with"),
    ]


def _builder(
    subject: x509.Name, issuer: x509.Name, key: object, days: int
) -> x509.CertificateBuilder:
    from cryptography import x509

    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)  # type: ignore[arg-type]
        .serial_number(x509.random_serial_number())
        .not_valid_before(_now() - SKEW)
        .not_valid_after(_now() + dt.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)  # type: ignore[arg-type]
    )


def _signed(
    builder: x509.CertificateBuilder, key: EllipticCurvePrivateKey, authority: object
) -> x509.Certificate:
    from cryptography import x509
    from cryptography.hazmat.primitives.hashes import SHA256

    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority)  # type: ignore[arg-type]
    return builder.add_extension(identifier, critical=False).sign(key, SHA256())


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        **dict.fromkeys(
            ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement"), False
        ),
        encipher_only=False,
        decipher_only=False,
    )


def _host(host: str) -> x509.GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    plain = host.removeprefix("*.").replace("-", "").replace(".", "")
    if not plain.isascii() or not plain.isalnum():
        raise VflairError(
            f"{host!r} is no host name and no address. Name hosts as data parties reach them, without a port: "
            "--host model.example.org --host 192.0.2.7."
        )
    return x509.DNSName(host)


def _named(common: str, *, unique: bool = False) -> x509.Name:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    # Two authorities of one name would be taken for each other.
    text = f"{common} {uuid.uuid4().hex[:8]}" if unique else common
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _new_key() -> EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP256R1())


def _key_bytes(key: EllipticCurvePrivateKey) -> bytes:
    from cryptography.hazmat.primitives import serialization as form

    return key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())


def _bytes(certificate: x509.Certificate) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return certificate.public_bytes(Encoding.PEM)


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


def _folder(path: Path) -> Path:
    path.mkdir(mode=0o700)
    return path


def _write(path: Path, data: bytes, what: str) -> Written:
    """Write a new file that nobody else may read, from the start on."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(data)
    return Written(path, what)
