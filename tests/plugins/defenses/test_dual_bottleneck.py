"""The bottleneck is mid's, and the tail leaves the published one by the equations; test_ranking.py attacks it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from vflair_core import DefenseError, Transcript
from vflair_core.training.fine_tuning import FineTuning, Train
from vflair_defenses.dual_bottleneck import DualBottleneck, cross_entropy_of
from vflair_defenses.mid import Mid
from vflair_defenses.rows import public_returned

IDS = torch.arange(5, 17).view(2, 6)
BATCH = {"input_ids": IDS, "labels": IDS, "attention_mask": torch.ones_like(IDS)}
CUTS = [("llama", 1, 1), ("gpt2", 1, 1)]  # of gpt2 the table is embeddings and logits at once


def moved(parties, bare):
    """Names of the data party's weights that are not as published."""
    weights = dict(bare.data_party.named_parameters())
    return {n for n, w in parties.data_party.named_parameters() if not torch.equal(w, weights[n])}


def test_the_cross_entropy_is_divergence_plus_entropy():
    ours, theirs = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    left, right = Categorical(logits=theirs), Categorical(logits=ours)
    expected = (kl_divergence(left, right) + left.entropy())[mask == 1].mean()
    assert float(cross_entropy_of(ours, theirs, mask)) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(("kind", "head", "tail"), CUTS)
def test_the_warm_up_moves_the_tail_alone_and_sends_no_gradient(defended, public, kind, head, tail):
    defense = DualBottleneck(steps=20, rate=0.01)
    parties, bare = (
        defended([defense], kind, head, tail, prepare=False),
        defended([], kind, head, tail),
    )
    with parties.data_party.channel.tap(Transcript()) as transcript:
        defense.prepare(public, parties.data_party)
    sent = [r for r in transcript.messages if r.role == "smashed"]
    assert len(sent) == len(public)
    assert not {r.role for r in transcript.messages} & {"hidden_grad", "smashed_grad"}
    number = parties.whole.config.num_hidden_layers - 1
    last, norm, more = {
        "llama": (f"model.layers.{number}.", "model.norm.weight", {"lm_head.weight"}),
        "gpt2": (f"transformer.h.{number}.", "transformer.ln_f.weight", {"transformer.ln_f.bias"}),
    }[kind]
    changed = moved(parties, bare)
    assert norm in changed
    assert {n for n in changed if not n.startswith(last)} == {norm, *more}
    weights = dict(bare.model_party.named_parameters())
    for name, weight in parties.model_party.named_parameters():
        assert torch.equal(weight, weights[name]), name
        assert weight.grad is None, name


def test_what_the_model_party_returns_is_as_before_until_it_is_trained(defended, public):
    """So the published tail reads it as before: the limit that the documentation states."""
    guarded, bare = (
        defended(each, "llama") for each in ([DualBottleneck(noise=0.0, steps=20, rate=0.01)], [])
    )
    ours, theirs = (
        [rows for _, rows in public_returned("a test", public, parties.data_party)]
        for parties in (guarded, bare)
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_the_tails_grow_apart_in_the_warm_up_and_more_so_where_that_weighs_more(defended):
    """Cross-entropy of two unsplit models, with the warmed-up tail and the published one."""
    apart = []
    for share in (1e-9, 1e3):
        defense = DualBottleneck(noise=0.0, dissimilarity=share, cap=1.0, steps=60, rate=3e-3)
        parties = defended([defense], "llama")
        ours = copy.deepcopy(parties.whole)
        ours.load_state_dict(dict(parties.data_party.named_parameters()), strict=False)
        with torch.no_grad():
            theirs = parties.whole(IDS).logits
            apart.append(float(cross_entropy_of(ours(IDS).logits, theirs)))
            start = float(Categorical(logits=theirs).entropy().mean())
    assert start < apart[0] < apart[1]


@pytest.mark.parametrize(("share", "bound"), [(1e3, True), (1e-6, False)])
def test_in_fine_tuning_its_gradient_is_at_most_a_tenth_of_the_tasks(defended, share, bound):
    """Gradients of the unsplit model with the warmed-up tail: of its loss, and of 1/CE with the published one."""
    defense = DualBottleneck(noise=0.0, dissimilarity=share, steps=10, rate=0.01)
    parties, bare = defended([defense], "llama"), defended([], "llama")
    names = sorted(moved(parties, bare))
    ours = copy.deepcopy(parties.whole)
    ours.load_state_dict(dict(parties.data_party.named_parameters()), strict=False)
    there = dict(ours.named_parameters())
    weights = [there[name] for name in names]
    out = ours(**BATCH)
    alike = 1 / cross_entropy_of(out.logits, parties.whole(IDS).logits.detach())
    task, way = (
        torch.autograd.grad(term, weights, retain_graph=True) for term in (out.loss, alike)
    )
    length, longest = (torch.cat([g.flatten() for g in each]).norm() for each in (way, task))
    factor = float(0.1 * longest / length) if bound else share
    assert (share * length > 0.1 * longest) == bound
    paid = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DualBottleneck, "penalty", spying(DualBottleneck.penalty, paid))
        parties.data_party.model.train()
        parties.data_party.model(**BATCH, use_cache=False).loss.backward()
    mine = dict(parties.data_party.model.named_parameters())
    assert float(paid[0].detach()) == pytest.approx(factor * float(alike.detach()), rel=1e-3)
    for name, first, second in zip(names, task, way, strict=True):
        assert torch.allclose(mine[name].grad, first + factor * second, rtol=1e-3, atol=1e-6), name


def spying(penalty, paid):
    def spy(defense, exchange):
        paid.append(penalty(defense, exchange))
        return paid[-1]

    return spy


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_without_dissimilarity_it_is_mid_bit_for_bit(defended, noise):
    runs = []
    for defense in (DualBottleneck(0.1, 0.0, noise=noise), Mid(0.1, noise=noise)):
        parties = defended([defense], "llama")
        rounds = FineTuning(parties.data_party, Train(steps=3, learning_rate=0.01))
        losses = [rounds.step(BATCH) for _ in range(3)]
        runs.append((losses, dict(parties.data_party.named_parameters())))
    (ours, weights), (theirs, expected) = runs
    assert ours == theirs
    assert all(torch.equal(weight, expected[name]) for name, weight in weights.items())


def test_a_tail_that_is_not_trained_is_told_what_to_do(defended, public):
    defense = DualBottleneck(steps=1)
    party = defended([defense], prepare=False).data_party
    for name, weight in party.named_parameters():
        weight.requires_grad_("wte" in name)  # a table that the head uses too
    with pytest.raises(DefenseError, match="none of them is trainable"):
        defense.prepare(public, party)


def test_a_restored_defense_goes_on_from_where_the_published_tail_was(defended):
    trained, fresh = DualBottleneck(steps=3), DualBottleneck(steps=3)
    defended([trained], "llama")
    fresh.load_state(trained.state())
    party = defended([fresh], "llama", prepare=False).data_party
    party.model.train()
    with pytest.raises(DefenseError, match="call prepare"):
        party.model(**BATCH, use_cache=False)
    before = {n: w.detach().clone() for n, w in party.model.named_parameters()}
    fresh.prepare([], party)
    assert all(torch.equal(w, before[n]) for n, w in party.model.named_parameters())
    kept = trained.state()
    assert all(torch.equal(value, kept[name]) for name, value in fresh.state().items())
    party.model(**BATCH, use_cache=False).loss.backward()
