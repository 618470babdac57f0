"""A connection may be cut anywhere: what comes of it is the same, and nothing is done twice."""

from __future__ import annotations

import copy
import threading
import time

import pytest
import torch

from support.remote_messages import Talk, doubled
from support.repeated_messages import Repeatable
from support.tcp_proxy import TcpProxy
from vflair_core import ChannelError, FineTuning, Partition, ServerLimits, Train, connect, split
from vflair_core.testing import remote_model_party, tiny_batch, tiny_model

NUMBERS = torch.arange(300_000.0)  # 1.2 MB: two pieces each way


@pytest.fixture
def through(serving, connected):
    """A server, a proxy before it, and a channel through both."""
    handle = Repeatable(doubled)
    server = serving(handle)
    with TcpProxy(server.port) as proxy:
        channel = connected(proxy.port, timeout=30)
        yield handle, proxy, channel
        channel.close()


@pytest.mark.parametrize("byte", [1, 9, 10, 100, 70_000, 1_100_000, 1_200_000])
@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_cut_at_any_byte_of_a_message_changes_nothing(through, direction, byte):
    handle, proxy, channel = through
    talk = Talk(channel)
    talk.say("open")
    proxy.cut_after = (direction, byte)
    talk.double(NUMBERS)
    talk.double(NUMBERS[:3])
    assert proxy.cuts == 1
    assert channel.connections == 2
    assert handle.done == {"open": 1, "forward": 2}


def test_a_cut_at_every_byte_of_a_small_reply_changes_nothing(through):
    handle, proxy, channel = through
    talk = Talk(channel)
    talk.say("open")
    before = proxy.passed["down"]
    talk.double(NUMBERS[:3])
    size = proxy.passed["down"] - before
    for byte in range(1, size, 7):
        proxy.cut_after = ("down", byte)
        talk.double(NUMBERS[:3])
    assert handle.done["forward"] == talk.seq - 1
    assert handle.repeated >= 1


def test_a_lost_reply_to_open_opens_no_second_session(through):
    handle, proxy, channel = through
    talk = Talk(channel)
    proxy.cut_after = ("down", 60)
    talk.say("open")
    assert handle.done == {"open": 1}
    assert handle.repeated == 1
    assert list(handle.replies) == [talk.session]
    talk.double(NUMBERS[:3])


def test_training_through_cuts_takes_the_same_steps():
    model = tiny_model("llama")
    batches = [tiny_batch(model, labels="tokens", seed=n) for n in range(6)]
    options = Train(steps=6, learning_rate=0.01, clip=0.5)
    here, _ = split(copy.deepcopy(model), Partition(1, 1))
    rounds = FineTuning(here, options)
    expected = [rounds.step(batch) for batch in batches]
    with remote_model_party(model, Partition(1, 1)) as remote:
        url = remote.url
        port = int(url.rpartition(":")[2].partition("?")[0])
        with TcpProxy(port) as proxy:
            near = url.replace(str(port), str(proxy.port))
            with connect(near, timeout=60) as channel:
                there, _ = split(copy.deepcopy(model), Partition(1, 1), channel=channel)
                rounds = FineTuning(there, options)
                found = []
                for number, batch in enumerate(batches):
                    proxy.cut_after = ("down" if number % 2 else "up", 400 + 900 * number)
                    found.append(rounds.step(batch))
                assert channel.connections == 1 + proxy.cuts > 4
    assert found == expected
    for name, weight in there.named_parameters():
        assert torch.equal(weight, dict(here.named_parameters())[name])


def test_a_reply_that_does_not_come_in_time_is_an_error_that_says_so(serving, connected):
    server = serving(Repeatable(doubled))
    with TcpProxy(server.port) as proxy:
        channel = connected(proxy.port, timeout=1)
        talk = Talk(channel)
        talk.say("open")
        proxy.stall_after = ("down", 1)
        with pytest.raises(ChannelError) as caught:
            talk.double(NUMBERS[:3])
        assert str(caught.value) == (
            f"The model party at 127.0.0.1:{proxy.port} cannot be reached: no reply to this 'forward' came within 1 "
            "seconds (timeout)."
        )
        talk.double(NUMBERS[:3])  # the same message once more, on a new stream
        channel.close()


def test_a_server_that_is_gone_is_tried_until_the_deadline(serving, connected):
    server = serving(Repeatable(doubled))
    channel = connected(server.port, timeout=1)
    talk = Talk(channel)
    talk.say("open")
    server.stop(0)
    start = time.monotonic()
    with pytest.raises(
        ChannelError, match=r"nothing listens there.* Attempts to send this 'forward': "
    ):
        talk.double(NUMBERS[:3])
    assert time.monotonic() - start < 20


def test_a_peer_that_stalls_in_the_middle_of_a_message_is_left(serving, connected):
    server = serving(Repeatable(doubled), limits=ServerLimits(stall=2))
    with TcpProxy(server.port) as proxy:
        channel = connected(proxy.port, timeout=10)
        other = Talk(connected(server.port))
        talk = Talk(channel)
        talk.say("open")
        other.say("open")
        assert server.streams == 2
        proxy.stall_after = ("up", 1_100_000)  # the first piece has come, the second has not
        talk.double(NUMBERS)  # the server leaves the stream, and the message is sent on another
        other.double(NUMBERS)
        assert channel.connections == 2
        channel.close()


def test_a_peer_that_does_not_take_its_reply_is_left(serving, connected):
    server = serving(Repeatable(doubled), limits=ServerLimits(stall=3))
    with TcpProxy(server.port) as proxy:
        channel = connected(proxy.port, timeout=120)
        talk = Talk(channel)
        talk.say("open")
        proxy.stall_after = ("down", 200_000)
        waiting = threading.Thread(target=talk.double, args=(torch.arange(2_000_000.0),))
        waiting.start()
        until = time.monotonic() + 100
        while proxy.cuts == 0 or (channel.connections == 1 and server.streams):
            assert time.monotonic() < until
            time.sleep(0.02)  # until the stream is left, or the client is on another already
        proxy.drop_all()  # what stalled never tells the client
        waiting.join(60)
        assert talk.seq == 2
        assert channel.connections > 1
        channel.close()


@pytest.mark.parametrize("twice", ["forward", "open"])
def test_a_message_that_comes_twice_is_carried_out_once(serving, connected, twice):
    model = tiny_model("llama")
    _, model_party = split(copy.deepcopy(model), Partition(1, 1))
    channel = connected(serving(model_party.handle).port)
    deliver, sent = channel.deliver, []

    def twice_over(message):
        if message.kind != twice:
            return deliver(message)
        sent.append((deliver(message), deliver(message)))
        return sent[-1][1]

    channel.deliver = twice_over
    party, _ = split(copy.deepcopy(model), Partition(1, 1), channel=channel)
    batch = tiny_batch(model)
    assert torch.equal(party.model(**batch).logits, model(**batch).logits)
    ((first, second),) = sent
    assert first.session == second.session == party.connection.session
    assert all(
        torch.equal(a.tensor, b.tensor) for a, b in zip(first.tensors, second.tensors, strict=True)
    )
    assert len(model_party.sessions) == 2  # with that of the `split` at the top


def test_an_idle_stream_is_closed_and_its_client_does_not_notice(serving, connected):
    server = serving(Repeatable(doubled), limits=ServerLimits(idle=0.2))
    channel = connected(server.port)
    talk = Talk(channel)
    talk.say("open")
    while server.streams:
        time.sleep(0.02)
    talk.double(NUMBERS[:3])
    assert channel.connections == 2
