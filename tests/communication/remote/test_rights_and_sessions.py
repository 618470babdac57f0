"""Whose a session is, and what a client may do."""

from __future__ import annotations

import pytest
import torch

from support.remote_messages import Talk, doubled
from support.repeated_messages import Repeatable
from vflair_core import Client, ProtocolError, SessionLostError
from vflair_core.communication.remote.session_names import SessionNames

NUMBERS = torch.ones(2, 3)
SECRET = b"a secret of the server's"


def by_token(rights=("infer", "train", "save", "resume")):
    def authenticate(metadata, _certificate):
        scheme, _, token = metadata.get("authorization", "").partition(" ")
        if scheme != "Bearer" or token not in ("anna", "berta"):
            raise ProtocolError("The token is not known here.")
        return Client(token, rights)

    return authenticate


@pytest.fixture
def two(serving, connected):
    """Talks of two clients with one server."""
    server = serving(Repeatable(doubled), authenticate=by_token(), secret=SECRET)
    return tuple(Talk(connected(server.port, token=name)) for name in ("anna", "berta"))


def test_the_server_names_sessions_and_nobody_can_guess_them(two):
    anna, berta = two
    anna.say("open")
    berta.say("open")
    assert anna.session != berta.session
    assert "asked" not in anna.session
    assert len(anna.session) == 64


def test_a_session_of_another_client_is_refused_and_stays_as_it_was(two):
    anna, berta = two
    anna.say("open")
    berta.say("open")
    own, berta.session, berta.seq = berta.session, anna.session, 1
    with pytest.raises(SessionLostError, match=r"knows no session '.*'… of client 'berta'"):
        berta.double(NUMBERS)
    with pytest.raises(
        ProtocolError, match=r"cannot be resumed: this server did not issue it to client 'berta'"
    ):
        berta.say("open", resume=[1])
    berta.session = own
    berta.double(NUMBERS)
    anna.double(NUMBERS)


def test_a_session_that_was_never_opened_is_refused(two):
    with pytest.raises(SessionLostError, match="knows no session 'asked'"):
        two[0].double(NUMBERS)


def test_open_under_another_clients_name_gives_a_session_of_ones_own(two):
    anna, berta = two
    anna.say("open")
    berta.session = anna.session
    berta.say("open")
    assert berta.session != anna.session


def test_a_client_goes_on_with_its_session_on_another_stream(serving, connected):
    server = serving(Repeatable(doubled), authenticate=by_token())
    talk = Talk(connected(server.port, token="anna"))
    talk.say("open")
    talk.channel = connected(server.port, token="anna")
    talk.double(NUMBERS)


def test_a_server_that_was_started_anew_knows_whose_a_session_is(serving, connected):
    talks = []
    for _ in range(2):
        server = serving(Repeatable(doubled), authenticate=by_token(), secret=SECRET)
        talks.append([Talk(connected(server.port, token=name)) for name in ("anna", "berta")])
    (anna, berta), (later, stranger) = talks
    for talk in (anna, berta):
        talk.say("open")
    later.session, stranger.session = anna.session, anna.session
    assert later.say("open", resume=[3]).session == anna.session
    with pytest.raises(ProtocolError, match="cannot be resumed"):
        stranger.say("open", resume=[3])


def test_another_secret_knows_no_session_of_before():
    name = SessionNames(b"one").issue("anna", "asked")
    assert SessionNames(b"one").owns("anna", name)
    assert not SessionNames(b"two").owns("anna", name)
    assert not SessionNames(b"one").owns("berta", name)
    assert not SessionNames(b"one").owns("anna", name[:-1] + ("0" if name[-1] != "0" else "1"))
    assert not SessionNames(b"one").owns("anna", "ü" * 64)


def test_a_secret_is_not_shown():
    assert "one" not in repr(SessionNames(b"one"))


NEEDS = [
    ("open", {"optimizer": {"name": "adamw"}}, "train"),
    ("open", {"resume": [1]}, "resume"),
    ("backward", {"accumulate": True}, "train"),
    ("backward", {}, "train"),
    ("norms", {}, "train"),
    ("prepare", {}, "train"),
    ("commit", {}, "train"),
    ("save", {}, "save"),
]


@pytest.mark.parametrize(("kind", "meta", "right"), NEEDS)
def test_what_a_client_has_no_right_to_is_refused(serving, connected, kind, meta, right):
    handle = Repeatable(doubled)
    server = serving(handle, authenticate=by_token(("infer",)))
    talk = Talk(connected(server.port, token="anna"))
    talk.say("open")
    with pytest.raises(ProtocolError) as caught:
        talk.say(kind, **meta)
    assert str(caught.value) == (
        f"Client 'anna' may not {right} here: this {kind!r} needs the right {right!r}, and it has infer. The server's "
        "operator gives rights."
    )
    assert handle.done == {"open": 1}
    talk.double(NUMBERS)  # the stream is as it was


@pytest.mark.parametrize(("kind", "meta", "right"), NEEDS)
def test_what_a_client_has_a_right_to_is_carried_out(serving, connected, kind, meta, right):
    server = serving(Repeatable(doubled), authenticate=by_token(("infer", right)))
    talk = Talk(connected(server.port, token="anna"))
    talk.say("open")
    assert talk.say(kind, **meta).kind == kind


def test_a_gradient_that_only_comes_back_needs_no_right_to_train(serving, connected):
    server = serving(Repeatable(doubled), authenticate=by_token(("infer",)))
    talk = Talk(connected(server.port, token="anna"))
    talk.say("open")
    assert talk.say("backward", NUMBERS, accumulate=False).kind == "backward"


def test_a_right_that_does_not_exist_is_refused():
    with pytest.raises(
        ProtocolError, match=r"no right 'fly'. Possible: infer, train, save, resume"
    ):
        Client("anna", ("infer", "fly"))
