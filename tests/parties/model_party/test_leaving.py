"""A data party that vanished is forgotten, by hand or after a while; who comes later is told that weights have moved."""

from __future__ import annotations

import copy
import time
import warnings

import pytest
import torch

from vflair_core import FineTuning, Partition, Train, join, split
from vflair_core.errors import ProtocolError
from vflair_core.parties.divide import divide
from vflair_core.testing import tiny_batch, tiny_model

SGD = Train(steps=4, optimizer="sgd", learning_rate=0.1)


def crowd(size=2, sharing="mean"):
    first, model_party = split(tiny_model("llama"), Partition(1, 1), wire=True)
    others = [join(tiny_model("llama"), model_party, Partition(1, 1)) for _ in range(size - 1)]
    model_party.sharing = sharing
    parties = [first, *others]
    return parties, model_party, [FineTuning(party, SGD) for party in parties]


def batch(seed=0):
    return tiny_batch(tiny_model("llama"), labels="tokens", seed=seed)


def weights(model_party):
    return [weight.detach().clone() for weight in model_party.parameters()]


def alone():
    data_party, model_party = split(tiny_model("llama"), Partition(1, 1))
    FineTuning(data_party, SGD).step(batch())
    return weights(model_party)


def test_a_round_says_for_how_many_it_waits_and_since_when():
    _, _, tunings = crowd()
    tunings[0].step(batch())
    with pytest.raises(
        ProtocolError, match=r"1 other data parties \(one 0 s silent\).*drop"
    ) as error:
        tunings[0].step(batch())
    assert "expiry" in str(error.value)


def test_who_is_dropped_by_hand_is_not_waited_for():
    (_, gone), model_party, tunings = crowd()
    tunings[0].step(batch())
    model_party.drop(gone.connection.session)
    assert all(map(torch.equal, weights(model_party), alone()))
    assert gone.connection.session not in model_party.sessions
    tunings[0].step(batch())
    with pytest.raises(ProtocolError, match="send 'open' first"):
        gone.model(**batch())


def test_a_session_that_is_not_there_is_named():
    (party, _), model_party, _ = crowd()
    with pytest.raises(ProtocolError, match=party.connection.session):
        model_party.drop("nobody")


def silent(model_party, party, seconds):
    model_party.sessions[party.connection.session].heard = time.monotonic() - seconds


def test_who_is_silent_for_too_long_is_not_waited_for():
    (_, gone), model_party, tunings = crowd()
    model_party.expiry = 60.0
    tunings[0].step(batch())
    silent(model_party, gone, 59)
    with pytest.raises(ProtocolError, match="waits for 1 other"):
        tunings[0].step(batch())
    silent(model_party, gone, 61)
    tunings[0].step(batch())
    assert len(model_party.sessions) == 1


def test_without_expiry_nobody_is_forgotten():
    (_, gone), model_party, tunings = crowd(sharing="turns")
    silent(model_party, gone, 1e9)
    tunings[0].step(batch())
    assert gone.connection.session in model_party.sessions
    tunings[1].step(batch())
    assert gone.step == 1


def test_who_asks_is_not_forgotten_however_late():
    (party,), model_party, (tuning,) = crowd(1)
    model_party.expiry = 1.0
    silent(model_party, party, 100)
    tuning.step(batch())
    assert party.step == 1
    assert party.connection.session in model_party.sessions


def test_a_round_does_not_end_over_a_graph_that_lives():
    (first, second, gone), model_party, tunings = crowd(3)
    tunings[0].step(batch())
    loss = second.model(**batch(1), use_cache=False).loss
    silent(model_party, gone, 100)
    model_party.expiry = 60.0
    loss.backward()  # nobody is dropped between forward and backward where that would change weights
    tunings[1].commit(0.1)
    assert first.step == second.step == 1


def test_a_chain_forgets_all_along():
    data_party, model_party = split(tiny_model("llama"), Partition(1, 1))
    further = divide(model_party, 1)
    data_party.model(**batch())
    model_party.drop(data_party.connection.session)
    assert not model_party.sessions
    assert not further.sessions


def test_who_begins_on_weights_that_moved_is_told():
    first, model_party = split(tiny_model("llama"), Partition(1, 1))
    tuning = FineTuning(first, SGD)
    for number in range(3):
        tuning.step(batch(number))
    first.close()
    with pytest.warns(UserWarning, match="other sessions took 3 steps.*load the model party anew"):
        second = join(copy.deepcopy(tiny_model("llama")), model_party, Partition(1, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FineTuning(second, SGD)  # once is enough
        FineTuning(second, SGD).step(batch())


def test_who_goes_on_with_a_session_of_its_own_is_not_told():
    data_party, _ = split(tiny_model("llama"), Partition(1, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            FineTuning(data_party, SGD).step(batch())
    assert data_party.step == 2
