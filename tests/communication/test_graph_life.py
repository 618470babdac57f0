"""What PyTorch users do with graphs: it works as on the whole model, or raises a clear error, and nothing leaks."""

from __future__ import annotations

import gc
import resource
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from vflair_core.errors import ProtocolError
from vflair_core.testing import tiny_batch, tiny_model


@pytest.fixture(params=[(1, 1), (1, 0)], ids=["HBT", "HT"])
def parties(request, cut):
    found = cut("llama", *request.param, wire=True)
    found.batch = tiny_batch(found.whole, labels="tokens")
    return found


def session_of(parties):
    return parties.model_party.sessions[parties.data_party.connection.session]


def loss_of(model, batch):
    return model(**batch, use_cache=False).loss


def own_weights(parties):
    """The data party's weights, and the same ones of the whole model."""
    whole = dict(parties.whole.named_parameters())
    own = dict(parties.data_party.named_parameters())
    return list(own.values()), [whole[name] for name in own]


def remote_gradients(parties):
    return [p.grad for p in parties.model_party.parameters() if p.grad is not None]


def test_autograd_grad_gives_gradients_and_leaves_none_behind(parties):
    ours, theirs = own_weights(parties)
    expected = torch.autograd.grad(loss_of(parties.whole, parties.batch), theirs)
    found = torch.autograd.grad(loss_of(parties.data_party.model, parties.batch), ours)
    assert all(map(torch.equal, found, expected))
    assert not remote_gradients(parties)
    assert all(weight.grad is None for weight in ours)
    assert not session_of(parties).graphs


def test_autograd_grad_after_a_backward_does_not_add_to_its_gradients(parties):
    ours, _ = own_weights(parties)
    loss = loss_of(parties.data_party.model, parties.batch)
    loss.backward(retain_graph=True)
    before = [gradient.clone() for gradient in remote_gradients(parties)]
    torch.autograd.grad(loss, ours)
    assert before
    assert all(map(torch.equal, before, remote_gradients(parties)))


def test_backward_to_some_inputs_leaves_the_gradients_of_all_other_weights_alone(parties):
    ours, theirs = own_weights(parties)
    loss_of(parties.whole, parties.batch).backward(inputs=theirs[:1])
    loss_of(parties.data_party.model, parties.batch).backward(inputs=ours[:1])
    assert torch.equal(ours[0].grad, theirs[0].grad)
    assert not remote_gradients(parties)


def test_the_gradient_of_the_embeddings_of_one_text_comes_back(parties):
    found = []
    for model in (parties.whole, parties.data_party.model):
        embedded = model.get_input_embeddings()(parties.batch["input_ids"]).detach()
        embedded.requires_grad_()
        labels = parties.batch["labels"]
        loss = model(inputs_embeds=embedded, labels=labels, use_cache=False).loss
        found.append(torch.autograd.grad(loss, embedded)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("tail", [0, 1], ids=["HT", "HBT"])
def test_a_second_derivative_through_the_cut_is_refused(cut, tail):
    # Only eager attention can be differentiated twice at all.
    parties = cut(model=tiny_model("llama", attn_implementation="eager"), head=1, tail=tail)
    ours, _ = own_weights(parties)
    loss = loss_of(parties.data_party.model, tiny_batch(parties.whole, labels="tokens"))
    (first, *_) = torch.autograd.grad(loss, ours[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.square().sum().backward()


def test_a_second_derivative_behind_the_cut_works(cut):
    """A gradient penalty on the logits bends nothing at the model party but goes back through it once."""
    parties = cut("llama")
    batch = tiny_batch(parties.whole, labels="tokens")
    found = []
    for model in (parties.whole, parties.data_party.model):
        outputs = model(**batch, use_cache=False)
        (slope,) = torch.autograd.grad(outputs.loss, outputs.logits, create_graph=True)
        slope.square().sum().backward()
        found.append(model.model.embed_tokens.weight.grad)
    assert found[0].abs().sum() > 0
    assert torch.allclose(*found, rtol=1e-5, atol=1e-9)


def test_five_forwards_and_one_backward_of_the_third(parties):
    losses = [loss_of(parties.data_party.model, parties.batch) for _ in range(5)]
    assert len(session_of(parties).graphs) == 5
    losses[2].backward()
    loss_of(parties.whole, parties.batch).backward()
    ours, theirs = own_weights(parties)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))
    losses.clear()
    gc.collect()
    with torch.no_grad():
        loss_of(parties.data_party.model, parties.batch)
    assert not session_of(parties).graphs


def test_a_graph_retained_and_then_dropped_is_released(parties):
    loss = loss_of(parties.data_party.model, parties.batch)
    loss.backward(retain_graph=True)
    assert len(session_of(parties).graphs) == 1
    del loss
    gc.collect()
    with torch.no_grad():
        loss_of(parties.data_party.model, parties.batch)
    assert not session_of(parties).graphs


def test_train_and_eval_reach_the_model_party(cut):
    parties = cut("gpt2")  # which drops units
    batch = tiny_batch(parties.whole)
    for train in (True, False, True):
        outputs = []
        for model in (parties.whole, parties.data_party.model):
            model.train(train)
            torch.manual_seed(2)
            outputs.append(model(**batch, use_cache=False).logits)
        assert torch.equal(*outputs)
        assert parties.model_party.model.training is train
    with torch.no_grad():
        torch.manual_seed(2)
        assert torch.equal(outputs[0], parties.data_party.model(**batch, use_cache=False).logits)


def test_a_closed_session_leaves_nothing_and_says_so(parties):
    loss_of(parties.data_party.model, parties.batch).backward()
    kept = loss_of(parties.data_party.model, parties.batch)
    parties.data_party.close()
    assert not parties.model_party.sessions
    assert not remote_gradients(parties)
    with pytest.raises(ProtocolError, match="no session"):
        kept.backward()


# -- threads ---------------------------------------------------------------------------------------------


def test_forwards_of_several_threads_each_get_their_own_answer(parties):
    batches = [tiny_batch(parties.whole, length=3 + n % 4, seed=n) for n in range(24)]
    expected = [parties.whole(**batch).logits for batch in batches]
    start = threading.Barrier(6)

    def run(first):
        start.wait()
        return [
            (n, parties.data_party.model(**batches[n]).logits.detach()) for n in range(first, 24, 6)
        ]

    with ThreadPoolExecutor(6) as pool:
        found = dict(pair for pairs in pool.map(run, range(6)) for pair in pairs)
    assert all(torch.equal(found[n], expected[n]) for n in range(24))


def test_backwards_of_several_threads_add_up(parties):
    batches = [tiny_batch(parties.whole, labels="tokens", seed=n) for n in range(12)]
    for batch in batches:
        loss_of(parties.whole, batch).backward()

    def run(first):
        for batch in batches[first::4]:
            loss_of(parties.data_party.model, batch).backward()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(4)))
    owners = (parties.data_party, parties.model_party)
    ours = {name: p.grad for owner in owners for name, p in owner.named_parameters()}
    for name, weight in parties.whole.named_parameters():
        assert torch.allclose(ours[name], weight.grad, rtol=1e-4, atol=1e-6), name
    assert not session_of(parties).graphs


def test_generation_in_several_threads_gives_what_each_would_give_alone(parties):
    prompts = [tiny_batch(parties.whole, rows=1, length=2 + n, seed=n) for n in range(4)]
    options = {"max_new_tokens": 5, "do_sample": False}
    expected = [parties.whole.generate(**prompt, **options) for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda p: parties.data_party.model.generate(**p, **options), prompts))
    assert all(map(torch.equal, found, expected))


def test_two_data_parties_in_two_threads_do_not_mix_their_gradients(cut):
    from vflair_core import Partition, join

    parties = cut("llama")
    second = join(tiny_model("llama"), parties.model_party, Partition(1, 1))
    batches = [tiny_batch(parties.whole, labels="tokens", seed=n) for n in range(2)]
    both = (parties.data_party, second)

    def run(n):
        for _ in range(10):
            loss_of(both[n].model, batches[n]).backward()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, range(2)))
    for party, batch in zip(both, batches, strict=True):
        parties.whole.zero_grad()
        for _ in range(10):
            loss_of(parties.whole, batch).backward()
        expected = dict(parties.whole.named_parameters())
        parties.model_party.shared.show(parties.model_party.sessions[party.connection.session])
        for name, weight in parties.model_party.named_parameters():
            assert torch.equal(weight.grad, expected[name].grad), name


# -- memory ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_memory_is_flat_over_ten_thousand_forwards_without_backward(cut):
    model = tiny_model("gpt2", num_hidden_layers=1, hidden_size=8)
    parties = cut(model=model, head=0, tail=0)
    batch = tiny_batch(model, rows=1, length=2)

    def run(times):
        for _ in range(times):
            assert parties.data_party.model(**batch, use_cache=False).logits.requires_grad
        gc.collect()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
        return sys.getallocatedblocks(), count_tensors(), peak

    run(100)  # fills what is remembered of the ways in which the model is called
    blocks, tensors, peak = run(1000)
    more_blocks, more_tensors, higher_peak = run(9000)
    assert more_tensors <= tensors
    assert more_blocks - blocks < 900  # less than one object of Python's in ten forwards
    assert (
        higher_peak - peak < 8192
    )  # less than one KiB a forward; the allocator has moods of a few MiB
    session, party, line = session_of(parties), parties.data_party, parties.data_party.connection
    assert len(session.graphs) <= 3
    assert (len(session.caches), len(session.jobs)) == (0, 1)
    held = (
        party.calls.dry_runs.roles,
        party.calls.counts.each,
        party.calls.dry_runs.seen_paths,
        party.calls.recorder._shapes._structures,
        line.graphs,
        line.caches,
    )
    assert all(len(kept) <= 8 for kept in held)


def count_tensors():
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
