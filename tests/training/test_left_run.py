"""A run that one process leaves and another takes up is the run that nobody left."""

from __future__ import annotations

import warnings

import pytest
import torch

from vflair_core import (
    CheckpointError,
    FineTuning,
    Lora,
    Partition,
    SessionLostError,
    Train,
    load_data_party,
    load_model_party,
    tune,
)
from vflair_core.testing import tiny_batch, tiny_model

OPTIONS = Train(steps=4, learning_rate=5e-3)
CUT = Partition(head=1, tail=1)


@pytest.fixture
def folder(tmp_path):
    # Dropout at both parties: a random stream that is not taken up shows in the losses.
    tiny_model("gpt2", seed=3).save_pretrained(tmp_path / "model")
    return tmp_path


@pytest.fixture
def batches():
    model = tiny_model("gpt2")
    return [
        [tiny_batch(model, labels="tokens", seed=10 * who + n) for n in range(4)] for who in (0, 1)
    ]


def model_party(folder):
    party = load_model_party(folder / "model", CUT)
    tune(party, adapters=Lora(r=2, dropout=0.2))
    party.sharing = "mean"
    return party


def started(folder, handle):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the weights have moved: the run is taken up for that
        party = load_data_party(folder / "model", CUT, channel=handle)
        tune(party, adapters=Lora(r=2, dropout=0.2))
        return FineTuning(party, OPTIONS)


def together(tunings, batches, steps):
    """Let data parties take steps in turn: the last one ends each round."""
    return [[t.step(each[n]) for t, each in zip(tunings, batches, strict=True)] for n in steps]


def adapters(party):
    return {name: w.detach().clone() for name, w in party.named_parameters() if w.requires_grad}


def test_two_parties_that_leave_and_are_taken_up_take_the_steps_of_those_that_stayed(
    folder, batches
):
    served = model_party(folder)
    stayed = [started(folder, served.handle) for _ in range(2)]
    expected = together(stayed, batches, range(4))

    torch.manual_seed(0)
    again = model_party(folder)
    torch.manual_seed(0)
    served_again = [started(folder, again.handle) for _ in range(2)]
    del stayed
    losses = together(served_again, batches, range(2))
    for number, tuning in enumerate(served_again):
        tuning.leave(folder / str(number))
    random = torch.get_rng_state()
    torch.manual_seed(99)  # another process
    taken = [started(folder, again.handle) for _ in range(2)]
    assert [tuning.take_up(folder / str(n)) for n, tuning in enumerate(taken)] == [2, 2]
    torch.set_rng_state(random)
    losses += together(taken, batches, range(2, 4))
    assert losses == expected
    assert len(again.sessions) == 2  # those that were opened on the way are closed
    for name, weight in adapters(served).items():
        assert torch.equal(weight, adapters(again)[name])


def test_what_others_trained_meanwhile_stays(folder, batches):
    served = model_party(folder)
    served.sharing = "turns"
    first, second = (started(folder, served.handle) for _ in range(2))
    first.step(batches[0][0])
    first.leave(folder / "left")
    second.step(batches[1][0])
    before = adapters(served)
    taken = started(folder, served.handle)
    taken.take_up(folder / "left")
    assert all(torch.equal(before[name], weight) for name, weight in adapters(served).items())
    assert all(
        torch.equal(weight, adapters(taken.party)[name])
        for name, weight in adapters(first.party).items()
    )


def test_a_run_is_taken_up_once(folder, batches):
    served = model_party(folder)
    first = started(folder, served.handle)
    first.step(batches[0][0])
    first.leave(folder / "left")
    first.step(batches[0][1])
    second = started(folder, served.handle)
    session = second.party.connection.session
    with pytest.raises(SessionLostError, match="gone on with elsewhere, dropped"):
        second.take_up(folder / "left")
    assert second.party.connection.session == session
    first.party.close()
    assert second.step(batches[0][0]) > 0  # the run that it began is whole


def test_a_session_that_was_dropped_cannot_be_taken_up(folder, batches):
    served = model_party(folder)
    first = started(folder, served.handle)
    first.leave(folder / "left")
    served.drop(first.party.connection.session)
    with pytest.raises(SessionLostError, match="cannot be taken up"):
        started(folder, served.handle).take_up(folder / "left")


def test_where_no_run_was_left_there_is_none_to_take_up(folder):
    with pytest.raises(CheckpointError, match="No run was left"):
        started(folder, model_party(folder).handle).take_up(folder / "nowhere")
