"""Tokens that a running program issues count until they are withdrawn, and let in nobody else."""

from __future__ import annotations

import grpc
import pytest

from vflair_core import (
    Admission,
    ChannelError,
    FineTuning,
    IssuedTokens,
    Partition,
    ProtocolError,
    Train,
    VflairError,
    connect,
    init_authority,
    split,
)
from vflair_core.testing import tiny_batch, tiny_model


@pytest.fixture
def tokens():
    return IssuedTokens()


@pytest.fixture
def reach(serving, tokens, tmp_path):
    """A function that connects with a token to a model party behind TLS."""
    init_authority(tmp_path / "tls")
    home = tmp_path / "tls" / "model-party"
    pair = [(home / "server-key.pem").read_bytes(), (home / "server.pem").read_bytes()]
    admission = Admission(tokens)
    _, model_party = split(tiny_model("llama"), Partition(1, 1))
    server = serving(
        model_party.handle,
        plaintext=False,
        credentials=grpc.ssl_server_credentials([tuple(pair)]),
        authenticate=admission,
        renew=admission.again,
    )

    def reached(token):
        return connect(
            f"grpc://127.0.0.1:{server.port}", ca=home / "ca.pem", token=token, timeout=20
        )

    return reached


def test_who_has_an_issued_token_is_let_in_until_it_is_withdrawn(tokens, reach):
    token = tokens.issue("node-7", ["train"])
    with reach(token) as channel:
        data_party, _ = split(tiny_model("llama"), Partition(1, 1), channel=channel)
        tuning = FineTuning(data_party, Train(steps=1))
        assert tuning.step(tiny_batch(data_party.model, labels="tokens")) > 0
        tokens.withdraw("node-7")
        with pytest.raises(ProtocolError, match="'node-7' is not known here any more"):
            tuning.step(tiny_batch(data_party.model, labels="tokens"))
    with pytest.raises(ChannelError, match="The token is not known here"):
        reach(token)


def test_a_token_that_was_not_issued_is_refused(tokens, reach):
    tokens.issue("node-7")
    with pytest.raises(ChannelError, match="The token is not known here"):
        reach("vflair_somebody-elses")
    with pytest.raises(ChannelError, match="asks for a token"):
        reach(None)


def test_a_client_has_the_rights_of_its_token_and_no_others(tokens, reach):
    with reach(tokens.issue("reader", [])) as channel:
        data_party, _ = split(tiny_model("llama"), Partition(1, 1), channel=channel)
        data_party.model(**tiny_batch(data_party.model), use_cache=False)
        with pytest.raises(ProtocolError, match="'reader' may not train"):
            FineTuning(data_party, Train(steps=1))


def test_a_client_has_one_token_and_a_name_that_can_be_one(tokens):
    tokens.issue("node-7")
    with pytest.raises(VflairError, match="has a token already"):
        tokens.issue("node-7")
    with pytest.raises(VflairError, match="cannot be the name"):
        tokens.issue("no/name")
    with pytest.raises(ProtocolError, match="no right 'rule'"):
        tokens.issue("node-8", ["rule"])


def test_tokens_differ_and_are_not_kept(tokens):
    first = tokens.issue("node-7")
    tokens.withdraw("node-7")
    second = tokens.issue("node-7")
    assert first != second
    assert tokens.find(first) is None
    assert tokens.find(second).name == "node-7"
    assert second not in repr(vars(tokens))
