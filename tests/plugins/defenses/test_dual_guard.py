"""A warm-up moves the data party's weights, and retention keeps them; tests/experiments/grading/test_ranking.py attacks that."""

from __future__ import annotations

import pytest
import torch

from vflair_core import DefenseError, Transcript
from vflair_core.training.fine_tuning import FineTuning, Train
from vflair_defenses.dual_guard import DualGuard

IDS = torch.arange(5, 17)[None]


def sent(party):
    with party.channel.tap(Transcript()) as transcript, torch.no_grad():
        party.model(input_ids=IDS, use_cache=False)
    return next(r.tensor for r in transcript.messages if r.role == "smashed")


@pytest.mark.parametrize(("kind", "head", "tail"), [("gpt2", 1, 1), ("llama", 2, 0)])
def test_the_warm_up_moves_what_is_sent_and_leaves_the_model_party_alone(
    defended, kind, head, tail
):
    guarded, bare = (
        defended(each, kind, head, tail) for each in ([DualGuard(steps=40, rate=0.01)], [])
    )
    ours, published = sent(guarded.data_party), sent(bare.data_party)
    alike = torch.nn.functional.cosine_similarity(ours, published, dim=-1)
    assert float(alike.abs().mean()) < 0.7
    weights = dict(bare.model_party.named_parameters())
    for name, weight in guarded.model_party.named_parameters():
        assert torch.equal(weight, weights[name]), name
        assert weight.grad is None, name


def test_retention_pulls_back_to_where_the_warm_up_ended(defended):
    """By hand: retention times the squared distance, so its gradient is twice retention times the difference."""
    defense = DualGuard(steps=2, retention=0.5)
    party = defended([defense]).data_party
    assert float(defense.penalty(None).detach()) == 0.0
    name, weight = next(iter(party.model.named_parameters()))
    with torch.no_grad():
        weight.add_(0.25)
    paid = defense.penalty(None)
    assert float(paid.detach()) == pytest.approx(0.5 * 0.0625 * weight.numel(), rel=1e-5)
    (gradient,) = torch.autograd.grad(paid, weight)
    assert torch.allclose(gradient, torch.full_like(weight, 0.25), atol=1e-6), name


def test_a_long_retention_keeps_the_weights_where_they_are(defended):
    moved = []
    for retention in (0.0, 1e3):
        defense = DualGuard(steps=2, retention=retention)
        party = defended([defense]).data_party
        tuning = FineTuning(party, Train(steps=5, learning_rate=0.001, optimizer="sgd", clip=0.0))
        for _ in range(5):
            tuning.step({"input_ids": IDS, "labels": IDS, "attention_mask": torch.ones_like(IDS)})
        state = defense.state()
        weights = dict(party.model.named_parameters())
        gaps = [(weights[n] - kept).square().sum() for n, kept in state.items()]
        moved.append(float(torch.stack(gaps).sum().detach()))
    assert moved[1] < moved[0]


def test_a_frozen_model_and_a_restored_defense_are_told_what_to_do(defended, public):
    defense = DualGuard(steps=2)
    party = defended([defense], prepare=False).data_party
    party.model.requires_grad_(requires_grad=False)
    with pytest.raises(DefenseError, match="none of them is trainable"):
        defense.prepare(public, party)
    trained = DualGuard(steps=2)
    parties = defended([trained])
    fresh = DualGuard(steps=2)
    fresh.load_state(trained.state())
    with pytest.raises(DefenseError, match="call prepare"):
        fresh.penalty(None)
    party = defended([fresh], prepare=False).data_party
    before = {n: w.detach().clone() for n, w in party.model.named_parameters()}
    fresh.prepare([], party)
    assert all(torch.equal(w, before[n]) for n, w in party.model.named_parameters())
    assert fresh.penalty(None) is not None
    assert parties is not None
