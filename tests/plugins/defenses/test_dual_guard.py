"""A head that has moved: unreadable for who has the published one, and readable as ever for who has the moved one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import vflair_defenses
from vflair_attacks import vflair_attacks as offered
from vflair_core import DefenseError, Transcript, hookimpl, plugin_manager, run
from vflair_core.config import experiment_from
from vflair_core.training import FineTuning, Train
from vflair_defenses.dual_guard import DualGuard

CONTRACT = Path(__file__).parents[2] / "contract"
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


def test_the_published_head_reads_little_and_the_current_one_reads_all():
    class Attacks:
        @hookimpl
        def vflair_attacks(self):
            return offered()

    manager = plugin_manager([CONTRACT / "mine.py"], entry_point_group="vflair.none")
    manager.register(Attacks())
    manager.register(vflair_defenses)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    table = {
        "task": {"name": "words"},
        "model": {"config": {"model_type": "llama", **sizes, **heads}, "vocab_size": 300},
        "partition": {"head": 1, "tail": 1},
        "train": {"steps": 2, "batch_size": 4, "max_length": 16},
        "victims": {"count": 6, "max_length": 12, "bypass": 2, "phase": "inference"},
        "defenses": [{"name": "dual-guard", "options": {"steps": 60, "rate": 0.01}}],
        "isolation": "inline",
        "attacks": [
            {"name": "vocabulary-search", "knowledge": knowledge, "options": {"prior": 0.0}}
            for knowledge in ("K2", "K3")
        ],
    }
    numbers = run(experiment_from(table), plugins=manager).numbers
    reached = {
        arm: [row["attack_performance"] for row in numbers[arm]["attacks"]]
        for arm in ("undefended", "defended")
    }
    assert reached["undefended"] == [1.0, 1.0]
    assert reached["defended"][0] < 0.3
    assert reached["defended"][1] == 1.0
