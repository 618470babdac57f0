"""What crosses under TLS, and the words of a client that does not get so far."""

from __future__ import annotations

import contextlib
import copy
import datetime as dt
import shutil

import grpc
import pytest
import torch

from support.remote_messages import Talk, doubled
from support.repeated_messages import Repeatable
from vflair_core import ChannelError, Client, Partition, connect, serve, split
from vflair_core.communication.remote import certificates
from vflair_core.communication.remote.certificates import init_authority
from vflair_core.testing import tiny_batch, tiny_model


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    """An authority, a server's certificate and that of anna."""
    folder = tmp_path_factory.mktemp("tls") / "trial"
    init_authority(folder, clients=["anna"])
    return folder


@contextlib.contextmanager
def served(folder, handle=doubled, *, mutual=True):
    """A server with the certificate of `folder`; `mutual` asks clients for theirs."""
    home = folder / "model-party"
    pair = [((home / "server-key.pem").read_bytes(), (home / "server.pem").read_bytes())]
    ca = (home / "ca.pem").read_bytes() if mutual else None
    credentials = grpc.ssl_server_credentials(pair, ca, require_client_auth=mutual)
    seen = []

    def authenticate(_metadata, certificate):
        seen.append(certificate)
        return Client(certificate or "nobody")

    with serve(handle, "127.0.0.1:0", credentials=credentials, authenticate=authenticate) as server:
        yield f"grpc://127.0.0.1:{server.port}", seen


def of(folder, *names):
    home = folder / "clients" / "anna"
    files = {
        "ca": home / "ca.pem",
        "certificate": home / "client.pem",
        "key": home / "client-key.pem",
    }
    return {name: files[name] for name in names}


def words(url, **options):
    with pytest.raises(ChannelError) as caught:
        connect(url, timeout=10, **options)
    return str(caught.value)


def test_a_model_over_mutual_tls_is_the_model_and_its_client_is_known_by_its_certificate(trial):
    model = tiny_model("llama")
    _, model_party = split(copy.deepcopy(model), Partition(1, 1))
    with (
        served(trial, model_party.handle) as (url, seen),
        connect(url, **of(trial, "ca", "certificate", "key")) as channel,
    ):
        data_party, _ = split(copy.deepcopy(model), Partition(1, 1), channel=channel)
        batch = tiny_batch(model)
        assert torch.equal(data_party.model(**batch).logits, model(**batch).logits)
    assert seen == ["anna"]


def test_the_files_may_stand_in_the_url(trial):
    files = of(trial, "ca", "certificate", "key")
    query = "&".join(f"{name}={path}" for name, path in files.items())
    with served(trial, Repeatable(doubled)) as (url, _), connect(f"{url}?{query}") as channel:
        talk = Talk(channel)
        talk.say("open")
        talk.double(torch.ones(2, 3))


def test_an_authority_that_is_not_the_servers(trial, tmp_path):
    init_authority(tmp_path / "other", clients=["anna"])
    with served(trial, mutual=False) as (url, _):
        for options in ({}, of(tmp_path / "other", "ca")):
            assert "not issued by an authority that is trusted here" in words(url, **options)


def test_a_certificate_for_another_name(tmp_path):
    init_authority(tmp_path / "t", hosts=["models.example.org"], clients=["anna"])
    with served(tmp_path / "t", mutual=False) as (url, _):
        assert "its certificate is for another name" in words(url, **of(tmp_path / "t", "ca"))


def test_a_certificate_that_has_run_out(tmp_path, monkeypatch):
    folder = tmp_path / "t"
    init_authority(folder, clients=["anna"])
    shutil.rmtree(folder / "model-party")
    long_ago = dt.datetime.now(dt.UTC) - dt.timedelta(days=90)
    monkeypatch.setattr(certificates, "_now", lambda: long_ago)
    certificates._server(folder, ["127.0.0.1"], 30)
    with served(folder, mutual=False) as (url, _):
        assert "its certificate has run out" in words(url, **of(folder, "ca"))


def test_no_certificate_or_a_foreign_one_where_one_is_asked_for(trial, tmp_path):
    init_authority(tmp_path / "other", clients=["anna"])
    foreign = of(tmp_path / "other", "certificate", "key")
    with served(trial) as (url, seen):
        for options in ({}, foreign):
            text = words(url, **of(trial, "ca"), **options)
            assert "It may want a certificate of the client" in text
    assert not seen


def test_a_key_that_is_another_certificates(trial, tmp_path):
    init_authority(tmp_path / "other", clients=["anna"])
    key = of(tmp_path / "other", "key")
    with served(trial) as (url, _):
        text = words(url, **of(trial, "ca", "certificate"), **key)
    assert "the files of ca, certificate and key cannot be used" in text


def test_plaintext_to_a_server_with_tls_and_tls_to_one_without(trial):
    with served(trial, mutual=False) as (url, _):
        assert "It may speak TLS: leave plaintext out" in words(url, plaintext=True)
    with serve(doubled, "127.0.0.1:0", plaintext=True) as server:
        text = words(f"grpc://127.0.0.1:{server.port}", **of(trial, "ca"))
        assert "it does not speak TLS" in text
