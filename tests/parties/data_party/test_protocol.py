"""One exchange after the other: graphs live until their backward, releases arrive, steps are counted."""

from __future__ import annotations

import gc

import pytest
import torch

from vflair_core.errors import ProtocolError
from vflair_core.testing import tiny_batch


@pytest.fixture
def parties(cut):
    found = cut("llama", wire=True)
    found.batch = tiny_batch(found.whole, labels="tokens")
    return found


def graphs_of(parties):
    return parties.model_party.sessions[parties.data_party.connection.session].graphs


def gradients_of(*owners):
    return {name: p.grad.clone() for owner in owners for name, p in owner.named_parameters()}


def assert_gradients_agree(parties):
    ours, expected = (
        gradients_of(parties.data_party, parties.model_party),
        gradients_of(parties.whole),
    )
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (ours[name] - gradient).abs().max() <= 1e-6 * gradient.abs().max(), name


def test_a_second_backward_without_retaining_is_refused_as_torch_refuses_it(parties):
    out = parties.data_party.model(**parties.batch)
    middle = out.logits.sum()
    torch.autograd.backward(middle, retain_graph=False)
    with pytest.raises((ProtocolError, RuntimeError)):
        middle.backward()


def test_a_second_backward_through_the_cut_alone_is_refused_by_name(cut):
    parties = cut(
        "llama", 1, 0
    )  # HT: the logits are what came back, no local layer lies behind the cut
    logits = parties.data_party.model(**tiny_batch(parties.whole)).logits
    gradient = torch.ones_like(logits)
    logits.backward(gradient)
    with pytest.raises((ProtocolError, RuntimeError), match=r"retain_graph|second time"):
        logits.backward(gradient)


def test_a_retained_graph_can_be_gone_back_through_again(parties):
    for model in (parties.whole, parties.data_party.model):
        loss = model(**parties.batch).loss
        loss.backward(retain_graph=True)
        loss.backward(retain_graph=True)
        loss.backward()
    assert_gradients_agree(parties)
    assert not graphs_of(parties)


def test_two_forwards_can_go_back_in_either_order(parties):
    other = tiny_batch(parties.whole, labels="tokens", seed=3, rows=2)
    for model in (parties.whole, parties.data_party.model):
        first, second = model(**parties.batch).loss, model(**other).loss
        first.backward()
        second.backward()
    assert_gradients_agree(parties)


def test_one_backward_through_two_forwards_equals_the_whole_model(parties):
    other = tiny_batch(parties.whole, labels="tokens", seed=3, rows=2)
    for model in (parties.whole, parties.data_party.model):
        (model(**parties.batch).loss + 2 * model(**other).loss).backward()
    assert_gradients_agree(parties)


def test_only_the_model_partys_weights_may_be_trained(parties):
    for owner in (parties.whole, parties.data_party.model):
        owner.requires_grad_(False)
    for name, weight in parties.whole.named_parameters():
        weight.requires_grad_(name.startswith(parties.data_party.absent))
    for model in (parties.whole, parties.data_party.model):
        model(**parties.batch).loss.backward()
    expected = dict(parties.whole.named_parameters())
    for name, weight in parties.model_party.named_parameters():
        assert torch.equal(weight.grad, expected[name].grad)


def test_three_hundred_forwards_without_backward_leave_nothing_behind(cut):
    parties = cut("gpt2")
    batch = tiny_batch(parties.whole, rows=1, length=2, labels="tokens")
    for _ in range(300):
        out = parties.data_party.model(**batch, use_cache=False)
        assert len(graphs_of(parties)) <= 3
    del out
    gc.collect()
    with torch.no_grad():
        parties.data_party.model(**batch, use_cache=False)
    assert not graphs_of(parties)


def test_forwards_without_gradients_leave_no_graph_at_all(parties):
    with torch.no_grad():
        parties.data_party.model(**parties.batch)
    assert not graphs_of(parties)
    with torch.inference_mode():
        parties.data_party.model(**parties.batch)
    assert not graphs_of(parties)


def test_graphs_over_the_cap_are_refused_and_none_is_dropped(parties):
    parties.model_party.caps.graphs = 2
    losses = [parties.data_party.model(**parties.batch).loss for _ in range(2)]
    with pytest.raises(
        ProtocolError, match=r"2 forwards wait for their backward. Use torch.no_grad"
    ):
        parties.data_party.model(**parties.batch)
    for loss in losses:
        loss.backward()
    parties.whole.zero_grad()
    for _ in range(2):
        parties.whole(**parties.batch).loss.backward()
    assert_gradients_agree(parties)
    parties.data_party.model(**parties.batch).loss.backward()


def test_caches_over_the_cap_are_refused_by_name(parties):
    parties.model_party.caps.caches = 2
    with torch.no_grad():
        kept = [parties.data_party.model(**parties.batch, use_cache=True) for _ in range(2)]
        with pytest.raises(ProtocolError, match="may keep 2 caches"):
            parties.data_party.model(**parties.batch, use_cache=True)
        kept.clear()
        gc.collect()
        parties.data_party.model(**parties.batch, use_cache=True)


def test_a_release_that_travels_with_a_refused_message_is_not_lost(parties):
    parties.model_party.caps.graphs = 1
    first = parties.data_party.model(**parties.batch)
    parties.data_party.connection.step = (
        9  # the next message is refused before anything in it is read
    )
    del first
    gc.collect()
    with pytest.raises(ProtocolError, match="step 9"):
        parties.data_party.model(**parties.batch)
    parties.data_party.connection.step = 0
    gc.collect()
    parties.data_party.model(**parties.batch).loss.backward()


def test_a_program_whose_first_message_was_refused_is_spelt_out_again(parties):
    parties.data_party.connection.step = 9
    with pytest.raises(ProtocolError, match="step 9"):
        parties.data_party.model(**parties.batch)
    parties.data_party.connection.step = 0
    ours = parties.data_party.model(**parties.batch).logits
    assert torch.equal(ours, parties.whole(**parties.batch).logits)


def test_a_program_is_spelt_out_once_and_then_called_by_its_id(parties):
    spelt = []
    with parties.data_party.channel.tap(
        lambda message, *_: spelt.append("program" in message.meta)
    ):
        for length in (7, 7, 5):
            parties.data_party.model(**tiny_batch(parties.whole, length=length), use_cache=False)
    assert spelt == [True, False] + 2 * [False, False]
