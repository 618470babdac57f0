"""What a peer may put into a stream, and how errors cross."""

from __future__ import annotations

import logging
import time

import grpc
import msgpack
import pytest
import torch

from support.remote_messages import Talk, doubled
from support.repeated_messages import Repeatable
from vflair_core import (
    ChannelError,
    ProtocolError,
    Served,
    ServerLimits,
    SessionLostError,
    connect,
    serve,
)
from vflair_core.communication import codec, error_frames
from vflair_core.communication.message import Crossing, Message
from vflair_core.communication.remote import frames
from vflair_core.errors import LeakError, PartitionError

NUMBERS = torch.ones(2, 3)
HELLO = frames.Hello("0.1.0", "float32").frame()


def heard(port, sent):
    """Send frames as they are, and return what comes back until the stream ends."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.stream_stream(frames.METHOD)(iter(sent), timeout=20)
        return list(call)


def error_in(frame):
    assert frame[:1] == error_frames.ERROR
    return msgpack.unpackb(frame[1:])


def opening(**options):
    return list(frames.pieces(codec.chunks(Message("open", "asked", 0, 0, 1, **options))))


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        ([b""], "must begin with a greeting"),
        ([b"GET / HTTP/1.1"], "must begin with a greeting"),
        ([frames.HELLO + b"\xc1"], "must begin with a greeting"),
        ([frames.HELLO + msgpack.packb([1])], "must begin with a greeting"),
        ([frames.HELLO + b"\xa5" * 2**17], "must begin with a greeting"),
        (opening(), "must begin with a greeting"),
        (
            [frames.HELLO + msgpack.packb([7, "9.9", "float32", 0])],
            r"speaks version 7 of the protocol (vflair 9.9), this one version 1 (vflair 0.1.0)",
        ),
        (
            [frames.HELLO + msgpack.packb([1, "0.1.0", "int4", 0])],
            "asks for wire dtype 'int4'; this one (vflair 0.1.0) knows float32, bfloat16, int8",
        ),
        ([HELLO, b"q?"], "A frame b'q' of 1 bytes is no piece of a message"),
        ([HELLO, frames.MORE + b"crumb"], "A frame b'm' of 5 bytes is no piece of a message"),
        ([HELLO, HELLO], "is no piece of a message"),
        ([HELLO, frames.LAST + b"pickle"], "must begin with 'vfl1'"),
        ([HELLO, frames.LAST + b"vfl1\xff\xff\xff\xff"], "The header claims 4294967295 bytes"),
        ([HELLO, opening()[0][:-3]], "A frame ended after"),
        ([HELLO, opening()[0] + b"more"], "the frame has 4 more"),
    ],
)
def test_a_broken_frame_ends_its_stream_by_name_and_hurts_no_other(serving, connected, sent, words):
    server = serving(Repeatable(doubled))
    other = Talk(connected(server.port))
    other.say("open")
    *_, last = heard(server.port, sent)
    assert error_in(last)[0] == "ProtocolError"
    assert words in error_in(last)[1]
    other.double(NUMBERS)
    assert other.channel.connections == 1


def test_a_header_that_describes_too_much_is_refused_before_its_tensors_come(serving):
    server = serving(doubled, limits=ServerLimits(message_bytes=10_000))
    large = (Crossing("x", "smashed", torch.zeros(10_000)),)
    first = opening(tensors=large)[0][:500]
    *_, last = heard(server.port, [HELLO, frames.LAST + first[1:]])
    assert "The header describes 40" in error_in(last)[1]


def test_a_client_refuses_to_send_what_the_server_would_not_take(serving, connected):
    server = serving(Repeatable(doubled), limits=ServerLimits(message_bytes=100_000))
    channel = connected(server.port)
    assert channel.message_bytes == 100_000
    talk = Talk(channel)
    talk.say("open")
    with pytest.raises(
        ProtocolError, match=r"has 400000 bytes, and the server takes messages of at most 100000"
    ):
        talk.double(torch.zeros(100_000))
    talk.double(NUMBERS)


@pytest.mark.parametrize(
    "error",
    [
        ProtocolError("Words of the protocol."),
        SessionLostError("Words of the session."),
        PartitionError("Words of the cut."),
        LeakError("Words of a leak.", "hidden_states"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_crosses_as_its_class_and_its_words(serving, connected, error):
    def handle(message):
        if message.kind == "forward":
            raise error
        return doubled(message)

    talk = Talk(connected(serving(handle).port))
    talk.say("open")
    for _ in range(2):
        with pytest.raises(type(error)) as caught:
            talk.say("forward", NUMBERS)
        assert type(caught.value) is type(error)
        assert str(caught.value) == str(error)
    assert talk.say("facts").kind == "facts"  # on the same stream
    assert talk.channel.connections == 1


def test_an_error_of_an_unknown_class_is_one_of_the_protocol():
    frame = error_frames.ERROR + msgpack.packb(["SystemExit", "Words."])
    assert type(error_frames.read_error(frame)) is ProtocolError
    assert str(error_frames.read_error(frame)) == "Words."
    for name in ("annotations", "did_you_mean", "FEW", "__builtins__"):
        assert (
            type(error_frames.read_error(error_frames.ERROR + msgpack.packb([name, "x"])))
            is ProtocolError
        )
    assert "cannot be read" in str(error_frames.read_error(error_frames.ERROR + b"\xc1"))


def test_long_words_are_cut():
    (_, text) = error_in(error_frames.error_frame(ProtocolError("x" * 10**6)))
    assert len(text) == 2000


def test_what_nobody_expected_is_logged_whole_and_told_in_short(serving, connected, caplog):
    def handle(message):
        if message.kind == "forward":
            raise FileNotFoundError("/srv/models/secret/path")
        return doubled(message)

    talk = Talk(connected(serving(handle).port))
    talk.say("open")
    with caplog.at_level(logging.ERROR), pytest.raises(ProtocolError) as caught:
        talk.say("forward", NUMBERS)
    assert str(caught.value) == (
        "The model party failed in carrying out this 'forward'; its log says why."
    )
    assert "/srv/models/secret/path" in caplog.text
    assert talk.say("facts").kind == "facts"


def test_who_watches_is_told_what_was_served(serving, connected):
    seen = []
    talk = Talk(connected(serving(Repeatable(doubled), watch=seen.append).port))
    talk.say("open")
    talk.double(NUMBERS)
    with pytest.raises(ProtocolError):
        talk.channel.request(Message("facts", talk.session, 0, 0, 99))
    assert all(isinstance(served, Served) for served in seen)
    facts = [(s.client, s.session, s.kind, s.received, s.sent, s.refused) for s in seen]
    assert facts == [
        ("local", talk.session, "open", 0, 0, None),
        ("local", talk.session, "forward", 24, 24, None),
        ("local", talk.session, "facts", 0, 0, "ProtocolError"),
    ]


# -- the way to the server ---------------------------------------------------------------------------------


def test_plaintext_is_for_this_machine_only():
    words = r"is not on this machine, and without TLS everybody on the way"
    for host in ("0.0.0.0", "192.0.2.1", "models.example.org", "[::]"):
        with pytest.raises(ChannelError, match=words):
            serve(doubled, f"{host}:0", plaintext=True)
        with pytest.raises(ChannelError, match=words):
            connect(f"grpc://{host}:8443", plaintext=True)


def test_a_server_needs_tls_or_plaintext_and_with_tls_who_is_let_in():
    with pytest.raises(ChannelError, match="needs either credentials"):
        serve(doubled, "127.0.0.1:0")
    with pytest.raises(ChannelError, match="needs either credentials"):
        serve(doubled, "127.0.0.1:0", plaintext=True, credentials=object())
    with pytest.raises(ChannelError, match="needs authenticate="):
        serve(doubled, "127.0.0.1:0", credentials=object())


@pytest.mark.parametrize("listen", ["8443", "127.0.0.1", "127.0.0.1:x", "127.0.0.1:0/path"])
def test_where_to_listen_is_said_in_one_way(listen):
    with pytest.raises(ChannelError, match="is not HOST:PORT"):
        serve(doubled, listen, plaintext=True)


def test_a_port_that_is_taken_is_an_error(serving):
    server = serving(doubled)
    with pytest.raises(
        ChannelError, match=f"Cannot listen on 127.0.0.1:{server.port}: it is taken"
    ):
        serve(doubled, f"127.0.0.1:{server.port}", plaintext=True)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://localhost:1", "does not say where the model party is"),
        ("grpc://localhost", "does not say where the model party is"),
        ("grpc://:80", "does not say where the model party is"),
        ("grpc://a@localhost:80", "names no user"),
        ("grpc://localhost:99999", "is no URL: Port out of range"),
        (
            "grpc://localhost:80?tokn_file=x",
            "no option 'tokn_file' of a URL. Did you mean 'token_file'",
        ),
        ("grpc://localhost:80?plaintext=yes", "plaintext must be true or false, not 'yes'"),
        (
            "grpc://localhost:80?plaintext=true&timeout=-1",
            "timeout must be a number of seconds > 0",
        ),
        ("grpc://localhost:80?ca=/nowhere/ca.pem", "The file of ca cannot be read"),
        ("grpc://localhost:80?certificate=/nowhere/me.pem", "are given together, or neither"),
        (
            "grpc://localhost:80?plaintext=true&ca=/nowhere/ca.pem",
            "does without TLS, for which ca would be",
        ),
    ],
)
def test_a_url_that_does_not_fit_is_refused_by_name(url, words):
    with pytest.raises(ChannelError) as caught:
        connect(url)
    assert words in str(caught.value)


def test_an_option_is_given_once():
    with pytest.raises(ChannelError, match="timeout is given twice"):
        connect("grpc://localhost:80?timeout=3&plaintext=true", timeout=3)


def test_an_unknown_wire_dtype_is_refused():
    with pytest.raises(ProtocolError, match=r"no wire dtype 'int9'. Did you mean 'int8'"):
        connect("grpc://localhost:80", plaintext=True, wire_dtype="int9")


def test_a_port_where_nothing_listens_is_told_at_once(serving):
    server = serving(doubled)
    server.stop(0)
    start = time.monotonic()
    with pytest.raises(ChannelError) as caught:
        connect(f"grpc://127.0.0.1:{server.port}", plaintext=True)
    assert str(caught.value) == (
        f"The model party at 127.0.0.1:{server.port} cannot be reached: nothing listens there. Check the port, and that "
        "the server runs."
    )
    assert time.monotonic() - start < 20


def test_a_name_that_does_not_exist_is_told():
    with pytest.raises(ChannelError, match="its name cannot be resolved"):
        connect("grpc://no-such-host.invalid:8443", timeout=5)


def test_a_server_that_does_not_take_the_wire_dtype_says_which_it_takes(serving, connected):
    server = serving(doubled, limits=ServerLimits(wire_dtypes=("float32",)))
    words = "The client asks for wire dtype 'int8'; this server takes float32."
    with pytest.raises(ProtocolError, match=words):
        connected(server.port, wire_dtype="int8")


def test_a_token_that_is_not_known_is_told(serving, connected):
    def nobody(_metadata, _certificate):
        raise ProtocolError("The token is not known here.")

    server = serving(doubled, authenticate=nobody)
    with pytest.raises(
        ChannelError, match="does not let this client in: The token is not known here"
    ):
        connected(server.port, token="x")


def test_an_authentication_that_fails_lets_nobody_in(serving, connected, caplog):
    server = serving(doubled, authenticate=lambda *_: 1 / 0)
    with pytest.raises(ChannelError, match="could not find out who this client is"):
        connected(server.port)
    assert "ZeroDivisionError" in caplog.text


def test_another_server_of_grpc_is_told_apart(connected):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as threads:
        server = grpc.server(threads)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            with pytest.raises(ChannelError, match="what listens there is no server of vflair"):
                connected(port)
        finally:
            server.stop(None).wait()


def test_more_streams_than_there_may_be_are_refused_by_name(serving, connected):
    server = serving(Repeatable(doubled), limits=ServerLimits(streams=1))
    connected(server.port)
    with pytest.raises(ChannelError, match="has 1 streams open, as many as it may"):
        connected(server.port)


def test_a_channel_stays_in_its_process_and_is_used_while_it_is_open(
    serving, connected, monkeypatch
):
    import copy
    import os

    talk = Talk(connected(serving(Repeatable(doubled)).port))
    with pytest.raises(ChannelError, match=r"cannot be copied or sent to another process"):
        copy.deepcopy(talk.channel)
    with monkeypatch.context() as other_process:
        other_process.setattr(os, "getpid", lambda: -1)
        with pytest.raises(ChannelError, match=r"forked from the one that opened the channel"):
            talk.say("open")
    talk.channel.close()
    with pytest.raises(ChannelError, match=r"was closed. Call connect\(...\) again"):
        talk.say("open")


def test_without_grpc_the_extra_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "grpc", None)
    with pytest.raises(ChannelError, match=r"pip install 'vflair-core\[grpc\]'"):
        connect("grpc://localhost:80", plaintext=True)
    with pytest.raises(ChannelError, match=r"pip install 'vflair-core\[grpc\]'"):
        serve(doubled, "127.0.0.1:0", plaintext=True)


@pytest.mark.parametrize(
    ("url", "options", "words"),
    [
        ("grpc://user:secret@localhost:1", {}, "names no user and no password"),
        ("grpc://localhost:1", {"token": "secret\nx"}, "one line of printable characters"),
        ("grpc://localhost:1", {"token": "sécret"}, "one line of printable characters"),
    ],
)
def test_a_secret_in_the_wrong_place_is_refused_and_not_repeated(url, options, words):
    with pytest.raises(ChannelError, match=words) as refused:
        connect(url, plaintext=True, **options)
    assert "secret" not in str(refused.value)
