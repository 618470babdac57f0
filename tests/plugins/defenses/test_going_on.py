"""A run that was stopped goes on to the same losses, with what a defense has drawn and learned on the way."""

from __future__ import annotations

import pytest
import torch

from vflair_core import Partition, split
from vflair_core.testing import tiny_model
from vflair_core.training.fine_tuning import FineTuning, Train
from vflair_defenses.adversarial_training import AdversarialTraining
from vflair_defenses.label_randomised_response import LabelRandomisedResponse

MAKERS = {
    "label-randomised-response": lambda: LabelRandomisedResponse(epsilon=0.5),
    "adversarial-training": lambda: AdversarialTraining(rate=0.05),
}


def batch(number):
    """Three batches of six examples, which come again: number 3 is number 0."""
    generator = torch.Generator().manual_seed(number % 3)
    ids = torch.randint(5, 60, (6, 5), generator=generator)
    labels = torch.randint(2, (6,), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@pytest.fixture(params=list(MAKERS))
def start(request, tmp_path):
    """A factory of runs that keep checkpoints in one place: start(noise) → FineTuning."""

    def make(noise):
        defense = MAKERS[request.param]()
        party, model_party = split(
            tiny_model("bert", "classification", num_labels=2),
            Partition(1, 1),
            defenses=[defense],
            seed=noise,
        )
        party.defenses.task_kind = "classification"
        defense.prepare([], party)
        model_party.checkpoints = tmp_path / "model"
        return FineTuning(party, Train(steps=9, learning_rate=0.01)), defense

    return make


def test_a_resumed_run_takes_the_same_steps(start, tmp_path):
    run, defense = start(noise=5)
    for n in range(3):
        run.step(batch(n))
    run.save(tmp_path / "data")
    kept = {name: value.clone() for name, value in defense.private_state().items()}
    expected = [run.step(batch(n)) for n in range(3, 6)]
    again, other = start(noise=77)
    again.load(tmp_path / "data")
    there = other.private_state()
    assert kept
    assert kept.keys() == there.keys()
    assert all(torch.equal(kept[name], there[name]) for name in kept)
    assert [again.step(batch(n)) for n in range(3, 6)] == expected


def test_nobody_else_is_told_the_answers(start):
    run, defense = start(noise=5)
    run.step(batch(0))
    assert not defense.private_state().keys() & defense.state().keys()
