"""The way between two sites without NVFlare's processes: whose a session is, what is lost, and how long anything takes."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("nvflare")

from nvflare.apis.signal import Signal
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey, ReturnCode

from vflair_core import (
    ChannelError,
    FineTuning,
    LocalChannel,
    Partition,
    ProtocolError,
    SessionLostError,
    Train,
    plugin_manager,
    split,
)
from vflair_core.testing import tiny_batch, tiny_model
from vflair_nvflare import SiteChannel, site_channel
from vflair_nvflare.model_site import Desk
from vflair_nvflare.site_channel import CURRENT, Job

CUT = Partition(1, 1)
CELLS = {"alice.job": "alice", "a.job": "a", "a.b.job": "a.b"}


def reply(payload=b"", code=ReturnCode.OK):
    headers = {MessageHeaderKey.RETURN_CODE: code}
    return SimpleNamespace(
        payload=payload, get_header=lambda key, default=None: headers.get(key, default)
    )


class Cell:
    """Stands for the cell of a job at a data site: brings requests to a desk, or does what it is told to instead."""

    def __init__(self, desk, origin="alice.job", faults=()):
        self.desk, self.origin, self.faults, self.sent = desk, origin, list(faults), []

    def send_request(
        self, *, channel, target, topic, request, timeout, secure, optional, abort_signal
    ):
        assert (channel, target, topic) == ("vflair", "model.job", "message")
        self.sent.append((bytes(request.payload), timeout))
        fault = self.faults.pop(0) if self.faults else None
        if fault == "reply lost":
            self.desk.answer(self.origin, request.payload, encrypted=secure)
            return reply(code=ReturnCode.TIMEOUT)
        if callable(fault):
            return fault(abort_signal)
        if fault is not None:
            return reply(code=fault)
        return reply(memoryview(self.desk.answer(self.origin, request.payload, encrypted=secure)))


def desk(**options):
    _, party = split(tiny_model("llama"), CUT)
    party.drop(*party.sessions)  # of the half that is not used
    return Desk(party, CELLS, **{"encrypted": True, "wire_dtype": "float32", **options})


def channel(cell, *, encrypt=True, timeout=5.0, abort=None, **options):
    job = Job(cell, {"model": "model.job"}, abort or Signal(), encrypt, timeout)
    return SiteChannel(job, "model", **options)


def train(way, steps=3):
    party, _ = split(tiny_model("llama"), CUT, channel=way)
    batch = tiny_batch(party.model, labels="tokens")
    tuning = FineTuning(party, Train(steps=steps, learning_rate=1e-2))
    losses = [tuning.step(batch) for _ in range(steps)]
    party.close()
    return losses


@pytest.fixture
def alone():
    return train(LocalChannel(split(tiny_model("llama"), CUT)[1].handle))


# -- the same as in one process --------------------------------------------------------------------------


def test_losses_are_those_of_one_process(alone):
    assert train(channel(Cell(desk()))) == alone


def test_every_message_may_be_lost_and_counts_once(alone):
    faults = ["reply lost", ReturnCode.COMM_ERROR, None, ReturnCode.TIMEOUT, "reply lost", None] * 4
    cell = Cell(desk(), faults=faults)
    assert train(channel(cell)) == alone
    frames = [frame for frame, _ in cell.sent]
    assert len(frames) > len(set(frames)) + 10  # the very same ones were sent again


def test_the_wire_dtype_of_the_job_holds(alone):
    rounded = train(channel(Cell(desk(wire_dtype="int8")), wire_dtype="int8"))
    assert rounded != alone
    with pytest.raises(ProtocolError, match="agreed"):
        train(channel(Cell(desk()), wire_dtype="int8"))


# -- deadlines -------------------------------------------------------------------------------------------


def test_a_model_party_that_does_not_answer_is_an_error_after_the_timeout():
    cell = Cell(desk(), faults=[ReturnCode.COMM_ERROR] * 1000)
    with pytest.raises(
        ChannelError,
        match=r"site 'model' cannot be reached: the way to it is inter.*timeout\): \d+",
    ):
        train(channel(cell, timeout=0.3))
    assert 1 < len(cell.sent) < 1000


def test_no_attempt_outlasts_the_time_that_is_left():
    def wait(signal):
        while not signal.triggered:
            time.sleep(0.01)
        return reply(code=ReturnCode.TIMEOUT)

    cell = Cell(desk(), faults=[wait] * 10)
    with pytest.raises(ChannelError, match="did not answer in time"):
        train(channel(cell, timeout=0.3))  # NVFlare would wait as long as its signal is quiet
    assert all(timeout <= 0.3 for _, timeout in cell.sent)


def test_a_job_that_is_stopped_ends_the_wait():
    abort = Signal()

    def stopped(signal):
        abort.trigger("stopped")
        assert signal.triggered
        return reply(code=ReturnCode.TIMEOUT)

    with pytest.raises(ChannelError, match="the job was stopped"):
        train(channel(Cell(desk(), faults=[stopped]), timeout=1000, abort=abort))


def test_what_cannot_get_better_is_not_tried_again():
    cell = Cell(desk(), faults=[ReturnCode.UNAUTHENTICATED])
    with pytest.raises(ChannelError, match="NVFlare reports 'unauthenticated'"):
        train(channel(cell, timeout=1000))
    assert len(cell.sent) == 1


def test_a_closed_channel_sends_nothing():
    cell = Cell(desk())
    way = channel(cell)
    way.close()
    with pytest.raises(ChannelError, match="was closed"):
        train(way)
    assert not cell.sent


# -- whose a session is ----------------------------------------------------------------------------------


def opened(of, origin):
    party, _ = split(tiny_model("llama"), CUT, channel=channel(Cell(of, origin)))
    return party


def test_a_session_belongs_to_the_site_that_opened_it():
    of = desk()
    alice, other = opened(of, "alice.job"), opened(of, "a.b.job")
    assert alice.connection.session.startswith("alice.")
    assert set(of.party.sessions) == {alice.connection.session, other.connection.session}
    other.connection.session = alice.connection.session  # as if it had been guessed
    with pytest.raises(SessionLostError, match=r"Site 'a\.b' has no session"):
        other.connection.facts()
    assert torch.is_tensor(alice.model(**tiny_batch(alice.model)).logits)


def test_no_site_takes_the_session_of_one_whose_name_begins_alike():
    of = desk()
    party, thief = opened(of, "a.b.job"), opened(of, "a.job")
    thief.connection.session = party.connection.session
    with pytest.raises(SessionLostError, match="Site 'a' has no session"):
        thief.connection.facts()


def test_a_cell_of_no_data_site_is_refused():
    with pytest.raises(ProtocolError, match="belongs to no data site"):
        opened(desk(), "mallory.job")
    with pytest.raises(ProtocolError, match="belongs to no data site"):
        opened(desk(), "alice.other-job")


def test_an_unencrypted_message_is_refused_where_all_are_to_be_encrypted():
    with pytest.raises(ProtocolError, match="came unencrypted"):
        train(channel(Cell(desk()), encrypt=False))
    assert train(channel(Cell(desk(encrypted=False)), encrypt=False), steps=1)


@pytest.mark.parametrize("name", ["", "x" * 65, "../../etc", "a.b"])
def test_the_name_of_a_session_is_plain(name):
    from vflair_core import Message

    of = desk()
    way = channel(Cell(of))
    with pytest.raises(ProtocolError, match="asked for by"):
        way.request(Message("open", name, 0, 0, 1, meta={"fingerprint": of.party.fingerprint}))


def test_a_lost_site_is_forgotten_and_the_others_stay():
    of = desk()
    alice, other = opened(of, "alice.job"), opened(of, "a.b.job")
    assert of.lose("alice") == 1
    assert of.lose("alice") == of.lose("nobody") == 0
    assert list(of.party.sessions) == [other.connection.session]
    with pytest.raises(SessionLostError):
        alice.connection.facts()
    assert other.connection.facts()


def test_others_need_not_wait_for_a_site_that_is_lost():
    """With "mean" the model party takes a step when all have committed; who is gone does not hold it up."""
    of = desk()
    of.party.sharing = "mean"
    parties = [opened(of, "alice.job"), opened(of, "a.b.job")]
    tunings = [FineTuning(party, Train(steps=2, learning_rate=1e-2)) for party in parties]
    before = [weight.clone() for weight in of.party.parameters()]
    tunings[0].step(tiny_batch(parties[0].model, labels="tokens"))
    assert all(torch.equal(a, b) for a, b in zip(before, of.party.parameters(), strict=True))
    of.lose("a.b")
    assert not all(torch.equal(a, b) for a, b in zip(before, of.party.parameters(), strict=True))


# -- the URL ---------------------------------------------------------------------------------------------


def test_a_url_opens_the_channel_of_the_job_that_runs():
    of = desk()
    job = Job(Cell(of), {"model": "model.job"}, Signal(), True, 5.0)
    token = CURRENT.set(job)
    try:
        url = "nvflare://model"
        party, _ = split(tiny_model("llama"), CUT, channel=url, plugins=plugin_manager())
        assert isinstance(party.channel, SiteChannel)
        whole = tiny_model("llama")
        batch = tiny_batch(whole)
        assert torch.equal(party.model(**batch).logits, whole(**batch).logits)
        with pytest.raises(
            ProtocolError, match=r"no model party at site 'modl'. Did you mean 'model'\?"
        ):
            site_channel.open_in_job("nvflare://modl", "float32")
    finally:
        CURRENT.reset(token)


def test_outside_a_job_a_url_says_what_it_is_for():
    with pytest.raises(ProtocolError, match="runs in none"):
        split(tiny_model("llama"), CUT, channel="nvflare://model", plugins=plugin_manager())


def test_other_urls_are_none_of_its_business():
    import vflair_nvflare

    assert vflair_nvflare.vflair_open_channel("ftp://model", {}) is None


def test_threads_of_one_data_party_take_turns():
    of = desk()
    party = opened(of, "alice.job")
    batch, found = tiny_batch(party.model), []
    threads = [
        threading.Thread(target=lambda: found.append(party.model(**batch).logits)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(torch.equal(found[0], other) for other in found)
