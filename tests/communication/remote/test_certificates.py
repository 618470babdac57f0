"""Trial certificates: OpenSSL takes them for what they are for and for nothing else, and nobody else may read them."""

from __future__ import annotations

import ssl
import stat

import pytest

pytest.importorskip("cryptography")

from cryptography import x509

from vflair_core.communication.remote.certificates import add_client, init_authority
from vflair_core.communication.remote.tls import read_authority, read_facts, read_identity
from vflair_core.errors import VflairError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of certificates: a model party's, and alice's."""
    folder = tmp_path_factory.mktemp("tls") / "trial"
    init_authority(folder, clients=["alice"])
    return folder


def shaken(server: tuple, client: tuple, host: str | None = "localhost", *, ask: bool = True):
    """A handshake in memory, of `ssl`'s own: (certificate, key, authority) of each."""
    contexts = []
    for protocol, (certificate, key, authority) in (
        (ssl.PROTOCOL_TLS_SERVER, server),
        (ssl.PROTOCOL_TLS_CLIENT, client),
    ):
        context = ssl.SSLContext(protocol)
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        context.load_verify_locations(authority)
        if certificate is not None:
            context.load_cert_chain(certificate, key)
        contexts.append(context)
    if ask:
        contexts[0].verify_mode = ssl.CERT_REQUIRED
    one, other = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        contexts[0].wrap_bio(one, other, server_side=True),
        contexts[1].wrap_bio(other, one, server_hostname=host),
    ]
    done = [False, False]
    while not all(done):
        for n, end in enumerate(ends):
            try:
                end.do_handshake()
                done[n] = True
            except ssl.SSLWantReadError:
                continue
    return ends


def of(folder, stem):
    return folder / f"{stem}.pem", folder / f"{stem}-key.pem", folder / "ca.pem"


def test_both_parties_trust_each_other_strictly(made):
    server, client = of(made / "model-party", "server"), of(made / "clients" / "alice", "client")
    for host in ("localhost", "127.0.0.1", "::1"):
        ends = shaken(server, client, host)
        assert dict(pair[0] for pair in ends[0].getpeercert()["subject"])["commonName"] == "alice"


def test_another_host_is_not_trusted(made):
    server, client = of(made / "model-party", "server"), of(made / "clients" / "alice", "client")
    with pytest.raises(ssl.SSLCertVerificationError, match=r"model\.example\.org"):
        shaken(server, client, "model.example.org")


def test_a_client_cannot_pass_for_the_model_party_nor_the_other_way_round(made):
    server, client = of(made / "model-party", "server"), of(made / "clients" / "alice", "client")
    with pytest.raises(ssl.SSLError):
        shaken(client, server, "alice", ask=False)
    with pytest.raises(ssl.SSLError):
        shaken(server, server)


def test_another_authority_of_the_same_kind_is_not_trusted(made, tmp_path):
    init_authority(tmp_path / "other", clients=["alice"])
    with pytest.raises(ssl.SSLCertVerificationError):
        shaken(
            of(made / "model-party", "server"),
            of(tmp_path / "other" / "clients" / "alice", "client"),
        )


def test_files_are_their_owners_alone(made):
    for path in [made, *made.rglob("*")]:
        wanted = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path


def test_hosts_and_names_and_dates_are_those_asked_for(tmp_path):
    init_authority(tmp_path / "t", hosts=["model.example.org", "2001:db8::7"], days=30)
    facts = read_facts(tmp_path / "t" / "model-party" / "server.pem")
    assert facts.names == ("model.example.org", "2001:db8::7")
    assert facts.days_left == 29  # and some hours
    root = x509.load_pem_x509_certificate((tmp_path / "t" / "authority" / "ca.pem").read_bytes())
    basic = root.extensions.get_extension_for_class(x509.BasicConstraints)
    assert basic.critical
    assert (basic.value.ca, basic.value.path_length) == (True, 0)


def test_a_client_is_added_later(made):
    written = add_client(made, "bob")
    assert {each.path.name for each in written} == {"client.pem", "client-key.pem", "ca.pem"}
    shaken(of(made / "model-party", "server"), of(made / "clients" / "bob", "client"))


def test_nothing_is_overwritten(made, tmp_path):
    before = {path: path.read_bytes() for path in made.rglob("*.pem")}
    with pytest.raises(VflairError, match="nothing is overwritten"):
        init_authority(made)
    with pytest.raises(VflairError, match="nothing is overwritten"):
        add_client(made, "alice")
    assert all(path.read_bytes() == data for path, data in before.items())
    (tmp_path / "empty").mkdir()
    init_authority(tmp_path / "empty")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hosts": ["https://model"]}, "no host name"),
        ({"hosts": ["model:4443"]}, "no host name"),
        ({"hosts": []}, "at least one host"),
        ({"clients": ["../alice"]}, "cannot be the name"),
        ({"clients": ["a", "a"]}, "a name of its own"),
        ({"days": 0}, "at least a day"),
        ({"days": 10_000}, "cannot sign for 10000"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(options, words, tmp_path):
    with pytest.raises(VflairError, match=words):
        init_authority(tmp_path / "t", **options)
    assert not list(tmp_path.iterdir())


def test_a_client_needs_an_authority(tmp_path):
    with pytest.raises(VflairError, match="vflair tls init"):
        add_client(tmp_path, "alice")


# -- reading ---------------------------------------------------------------------------------------------


def test_what_was_made_is_read(made):
    home = made / "model-party"
    identity = read_identity(home / "server.pem", home / "server-key.pem", "server")
    assert identity.certificate.startswith(b"-----BEGIN CERTIFICATE")
    assert read_authority(home / "ca.pem") == (made / "authority" / "ca.pem").read_bytes()


def test_files_that_do_not_fit_are_refused_in_plain_words(made, tmp_path):
    home, alice = made / "model-party", made / "clients" / "alice"
    certificate, key = home / "server.pem", home / "server-key.pem"
    cases = [
        (tmp_path / "none.pem", key, "server", "No such file"),
        (certificate, tmp_path / "none.pem", "server", "No such file"),
        (key, key, "server", "no certificate in PEM, but a private key"),
        (certificate, certificate, "server", "holds no private key"),
        (certificate, alice / "client-key.pem", "server", "does not belong to the certificate"),
        (certificate, key, "client", "not a client's"),
        (alice / "client.pem", alice / "client-key.pem", "server", "not a server's"),
    ]
    for certificate_, key_, purpose, words in cases:
        with pytest.raises(VflairError, match=words):
            read_identity(certificate_, key_, purpose)
    with pytest.raises(VflairError, match="holds no authority"):
        read_authority(home / "server.pem")


def test_a_key_that_others_may_read_is_refused(made, tmp_path):
    copy = tmp_path / "key.pem"
    copy.write_bytes((made / "model-party" / "server-key.pem").read_bytes())
    copy.chmod(0o604)
    with pytest.raises(VflairError, match="chmod 600"):
        read_identity(made / "model-party" / "server.pem", copy, "server")


def test_a_key_with_a_passphrase_is_refused(made, tmp_path):
    from cryptography.hazmat.primitives import serialization as form

    key = form.load_pem_private_key((made / "model-party" / "server-key.pem").read_bytes(), None)
    locked = tmp_path / "locked.pem"
    locked.touch(0o600)
    locked.write_bytes(
        key.private_bytes(
            form.Encoding.PEM, form.PrivateFormat.PKCS8, form.BestAvailableEncryption(b"x")
        )
    )
    with pytest.raises(VflairError, match="has a passphrase"):
        read_identity(made / "model-party" / "server.pem", locked, "server")


def test_a_certificate_that_has_ended_or_not_begun_is_refused(monkeypatch, tmp_path):
    import datetime as dt

    from vflair_core.communication.remote import certificates

    today = dt.datetime.now(dt.UTC)
    for shift, words in ((-40, "ended on"), (40, "begins on")):
        monkeypatch.setattr(certificates, "_now", lambda s=shift: today + dt.timedelta(days=s))
        folder = tmp_path / f"at{shift}"
        init_authority(folder, days=30)
        home = folder / "model-party"
        with pytest.raises(VflairError, match=words):
            read_identity(home / "server.pem", home / "server-key.pem", "server")
