"""Who is let in: by a token, by a certificate, by both; and what becomes of those who were."""

from __future__ import annotations

import pytest

from vflair_core import ProtocolError, VflairError
from vflair_core.communication.remote.admission import Admission
from vflair_core.communication.remote.clients import Clients, entry_for, new_token
from vflair_core.communication.remote.rights import RIGHTS

TOKENS = {"alice": new_token(), "bob": new_token()}


@pytest.fixture
def clients(tmp_path):
    file = tmp_path / "clients.toml"
    file.touch(0o600)
    file.write_text("\n".join(entry_for(name, token, ["infer"]) for name, token in TOKENS.items()))
    return Clients(file)


def bearer(token):
    return {"authorization": f"Bearer {token}"}


def test_a_token_alone_names_a_client(clients):
    admission = Admission(clients, certificates=False)
    assert admission(bearer(TOKENS["alice"]), None).name == "alice"
    assert admission({"authorization": f"bearer {TOKENS['bob']}"}, None).rights == {"infer"}
    for metadata in ({}, {"authorization": TOKENS["bob"]}, {"authorization": "Bearer "}):
        with pytest.raises(ProtocolError, match="asks for a token"):
            admission(metadata, None)


def test_a_certificate_alone_names_a_client_that_may_do_everything():
    admission = Admission(None, certificates=True)
    client = admission({}, "carol")
    assert (client.name, client.rights) == ("carol", frozenset(RIGHTS))
    assert admission.again(client) == client
    with pytest.raises(ProtocolError, match="names nobody"):
        admission({}, None)
    with pytest.raises(VflairError, match="cannot be the name"):
        admission({}, "carol, of accounting")


def test_both_must_be_of_the_same_client(clients):
    admission = Admission(clients, certificates=True)
    assert admission(bearer(TOKENS["alice"]), "alice").name == "alice"
    with pytest.raises(ProtocolError, match="another client's than the certificate"):
        admission(bearer(TOKENS["alice"]), "bob")
    with pytest.raises(ProtocolError, match="names nobody"):
        admission(bearer(TOKENS["alice"]), None)
    with pytest.raises(ProtocolError, match="asks for a token"):
        admission({}, "alice")


def test_neither_is_for_one_machine():
    client = Admission(None, certificates=False)({}, None)
    assert client.rights == frozenset(RIGHTS)


def test_who_is_refused_is_told_of_without_a_token(clients):
    told = []
    admission = Admission(clients, True, lambda *facts: told.append(facts))
    with pytest.raises(ProtocolError):
        admission(bearer("secret"), "alice")
    ((name, reason),) = told
    assert name == "alice"
    assert "secret" not in reason


def test_who_was_let_in_is_looked_up_again(clients, tmp_path):
    admission = Admission(clients, certificates=False)
    client = admission(bearer(TOKENS["alice"]), None)
    (tmp_path / "clients.toml").write_text(entry_for("alice", TOKENS["alice"], ["infer", "save"]))
    assert admission.again(client).rights == {"infer", "save"}
    (tmp_path / "clients.toml").write_text(entry_for("bob", TOKENS["bob"], ["infer"]))
    with pytest.raises(ProtocolError, match="not known here any more"):
        admission.again(client)
