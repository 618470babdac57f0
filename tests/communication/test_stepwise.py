"""A data party that is asked for its next request does what it does when it asks itself."""

from __future__ import annotations

import threading

import pytest
import torch

from vflair_core import (
    ChannelError,
    FineTuning,
    LocalChannel,
    Partition,
    ProtocolError,
    Stepwise,
    Train,
    answer,
    split,
)
from vflair_core.testing import tiny_batch, tiny_model

CUT = Partition(1, 1)


def model_party():
    return split(tiny_model("llama"), CUT)[1]


def work(channel, steps=3):
    party, _ = split(tiny_model("llama"), CUT, channel=channel)
    batch = tiny_batch(party.model, labels="tokens")
    tuning = FineTuning(party, Train(steps=steps, learning_rate=1e-2))
    losses = [tuning.step(batch) for _ in range(steps)]
    tokens = party.model.eval().generate(batch["input_ids"], max_new_tokens=4, do_sample=False)
    party.close()
    return losses, tokens.tolist()


def driven(steps, handle):
    """Drive to the end, and return what crossed."""
    frames = []
    while request := steps.next():
        frames.append(request)
        steps.reply(answer(handle, request))
    return frames


def threads():
    return [t for t in threading.enumerate() if t.name == "vflair data party"]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not threads()


# -- the same as otherwise -------------------------------------------------------------------------------


@pytest.mark.parametrize("wire_dtype", ["float32", "int8"])
def test_losses_and_tokens_are_those_of_one_process(wire_dtype):
    local = work(LocalChannel(model_party().handle, wire=True, wire_dtype=wire_dtype))
    handle = model_party().handle
    with Stepwise(work, wire_dtype=wire_dtype) as steps:
        while request := steps.next():
            steps.reply(answer(handle, request, wire_dtype=wire_dtype))
        assert steps.result == local


def test_nothing_begins_before_it_is_asked():
    begun = []
    with Stepwise(lambda channel: begun.append(1)) as steps:
        assert not threads()
        assert not begun
        assert steps.next() is None
        assert begun == [1]
        assert steps.result is None
    with Stepwise(lambda channel: begun.append(2)):
        pass  # it was never asked
    assert begun == [1]


def test_asked_again_it_gives_the_same_request_and_carried_out_twice_it_counts_once():
    local = work(LocalChannel(model_party().handle))
    handle = model_party().handle
    with Stepwise(work) as steps:
        while request := steps.next():
            assert steps.next() == request
            first = answer(handle, request)
            if b"close" not in request[:100]:  # a session that is closed is not known any more
                assert answer(handle, request) == first  # such as after a lost reply
            steps.reply(first)
        assert steps.result == local


def test_two_data_parties_can_be_driven_by_turns():
    alone = driven_result(work)
    handles = [model_party().handle for _ in range(2)]
    with Stepwise(work) as one, Stepwise(work) as other:
        open_ones = list(zip((one, other), handles, strict=True))
        while open_ones:
            for steps, handle in list(open_ones):
                if request := steps.next():
                    steps.reply(answer(handle, request))
                else:
                    open_ones.remove((steps, handle))
        assert one.result == other.result == alone


def driven_result(function):
    with Stepwise(function) as steps:
        driven(steps, model_party().handle)
        return steps.result


def test_it_can_be_looked_at_without_waiting():
    go = threading.Event()

    def slow(channel):
        go.wait(30)
        return work(channel, steps=1)

    handle = model_party().handle
    with Stepwise(slow) as steps:
        with pytest.raises(TimeoutError, match="still computes"):
            steps.next(0)
        with pytest.raises(TimeoutError):
            steps.next(0.01)
        go.set()
        driven(steps, handle)
        assert len(steps.result[0]) == 1


def test_threads_of_the_work_take_turns():
    handle = model_party().handle

    def both(channel):
        found = [None, None]
        parties = [split(tiny_model("llama"), CUT, channel=channel)[0] for _ in range(2)]
        batch = tiny_batch(parties[0].model)

        def ask(n):
            found[n] = parties[n].model(**batch).logits.detach()

        started = [threading.Thread(target=ask, args=(n,)) for n in range(2)]
        for thread in started:
            thread.start()
        for thread in started:
            thread.join()
        return found

    with Stepwise(both) as steps:
        driven(steps, handle)
        whole = tiny_model("llama")
        expected = whole(**tiny_batch(whole)).logits
        assert all(torch.equal(logits, expected) for logits in steps.result)


# -- what goes wrong -------------------------------------------------------------------------------------


def test_what_the_work_raises_comes_out_where_the_next_request_is_asked_for():
    def broken(channel):
        party, _ = split(tiny_model("llama"), CUT, channel=channel)
        party.close()
        raise LookupError("no such record")

    with Stepwise(broken) as steps:
        with pytest.raises(LookupError, match="no such record"):
            driven(steps, model_party().handle)
        with pytest.raises(LookupError):
            steps.next()
        with pytest.raises(ProtocolError, match="ended in an error: LookupError"):
            _ = steps.result


def test_a_refusal_of_the_model_party_reaches_the_work():
    other = split(tiny_model("llama", seed=1), CUT)[1].handle
    with Stepwise(work) as steps, pytest.raises(ProtocolError, match="two halves"):
        driven(steps, other)


def test_a_request_that_could_not_be_brought_fails_and_may_be_made_again():
    handle = model_party().handle
    lost = []

    def patient(channel):
        party, _ = split(tiny_model("llama"), CUT, channel=channel)
        batch = tiny_batch(party.model)
        try:
            party.model(**batch)
        except ChannelError as error:
            lost.append(str(error))
        logits = party.model(**batch).logits
        party.close()
        return logits

    with Stepwise(patient) as steps:
        steps.reply(answer(handle, steps.next()))
        steps.next()
        steps.fail(ChannelError("The line is down."))
        driven(steps, handle)
        whole = tiny_model("llama")
        assert torch.equal(steps.result, whole(**tiny_batch(whole)).logits)
    assert lost == ["The line is down."]


def test_the_work_does_not_wait_longer_than_its_timeout():
    with Stepwise(work, timeout=0.05) as steps:
        request = steps.next()
        assert request
        steps._thread.join(30)  # it gives up
        with pytest.raises(ChannelError, match=r"No reply came within 0\.05 seconds"):
            steps.next()
        with pytest.raises(ProtocolError, match="No request waits"):
            steps.reply(answer(model_party().handle, request))


@pytest.mark.parametrize("timeout", [0, -1, float("nan")])
def test_a_timeout_is_a_time(timeout):
    with pytest.raises(ChannelError, match="timeout must be"):
        Stepwise(work, timeout=timeout)


def test_a_reply_to_nothing_is_refused():
    with Stepwise(work) as steps:
        with pytest.raises(ProtocolError, match="call next"):
            steps.reply(b"")
        request = steps.next()
        steps.reply(answer(model_party().handle, request))
        with pytest.raises(ProtocolError, match="No request waits"):
            steps.reply(b"")
        steps.next()


def test_closing_ends_work_that_waits_even_if_it_is_patient():
    ended = []

    def patient(channel):
        try:
            while True:
                try:
                    work(channel)
                except ChannelError:
                    continue
        finally:
            ended.append(True)

    steps = Stepwise(patient)
    assert steps.next()
    assert threads()
    steps.close()
    assert ended == [True]
    assert not threads()
    steps.close()  # once more does nothing
    with pytest.raises(ChannelError, match="closed"):
        steps.next()
    with pytest.raises(ProtocolError, match="not done"):
        _ = steps.result


def test_closing_in_the_middle_of_a_backward_ends_it():
    handle = model_party().handle
    with Stepwise(work) as steps:
        while request := steps.next():
            if b"backward" in request[:100]:
                break
            steps.reply(answer(handle, request))
        assert request


def test_closing_says_if_the_work_still_computes():
    go = threading.Event()
    steps = Stepwise(lambda channel: go.wait(30))
    with pytest.raises(TimeoutError):
        steps.next(0)
    with pytest.raises(TimeoutError, match="still computes"):
        steps.close(0.01)
    go.set()
    steps.close()
