"""What an experiment tells an attacker on purpose: labels, candidates, updates, and what that changes."""

from __future__ import annotations

import pytest

import vflair_attacks
from support.paths import SAMPLE_PLUGIN
from vflair_core import plugin_manager, run
from vflair_core.errors import AttackError, ExperimentError
from vflair_core.experiments.attack_phase import attack_again
from vflair_core.experiments.config import experiment_from

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture
def pm():
    manager = plugin_manager([SAMPLE_PLUGIN], entry_point_group="vflair.none")
    manager.register(vflair_attacks)
    return manager


def told(task="two-words", *, attacks, isolation="inline", **victims):
    table = {
        "task": {"name": task},
        "model": {"config": LLAMA, "vocab_size": 300},
        "partition": {"head": 2, "tail": 1},
        "train": {"steps": 4, "batch_size": 4, "max_length": 16},
        "victims": {"count": 12, "max_length": 16, **victims},
        "attacks": attacks,
        "isolation": isolation,
    }
    return experiment_from(table)


def grades(result, arm="undefended"):
    return {grade["attack"]: grade for grade in result.numbers[arm]["attacks"]}


def test_all_label_attacks_run_in_the_worker_and_enumeration_is_exact(pm):
    attacks = [
        {"name": name, "knowledge": ["K3", "known_labels"]}
        for name in ("label-enumeration", "bli", "norm-scoring", "spectral", "label-completion")
    ]
    found = grades(run(told(attacks=attacks, count=16, known=10, isolation="process"), plugins=pm))
    assert found["label-enumeration"]["attack_performance"] == 1.0
    assert found["bli"]["attack_performance"] == 1.0
    assert all(0.0 <= grade["attack_performance"] <= 1.0 for grade in found.values())


def test_labels_that_were_told_are_not_graded(pm):
    """A guess of class 0 for all: its accuracy is the share of class 0 among the others."""
    first = run(told(attacks=[{"name": "last-label"}]), plugins=pm)
    later = run(told(attacks=[{"name": "last-label"}], known=5), plugins=pm)
    task = pm.hook.vflair_tasks()[0]["two-words"]()
    labels = [task.row("train", n).label for n in range(12)]
    (all_of_them,) = grades(first).values()
    (others,) = grades(later).values()
    assert all_of_them["attack_performance"] == pytest.approx(labels.count(0) / 12)
    assert others["attack_performance"] == pytest.approx(labels[5:].count(0) / 7)


def test_shared_updates_give_the_text_and_the_result_says_that_they_were_assumed(pm):
    attacks = [{"name": "dager", "knowledge": ["K3", "updates"]}]
    result = run(
        told("words", attacks=attacks, share_updates=True, isolation="process"), plugins=pm
    )
    assert result.numbers["undefended"]["assumes_shared_updates"] is True
    (grade,) = grades(result).values()
    assert grade["attack_performance"] == 1.0
    without = run(told("words", attacks=[]), plugins=pm)
    assert without.numbers["undefended"]["assumes_shared_updates"] is False


def test_updates_of_batches_give_the_text_and_change_nothing_of_what_crossed_alone(pm, tmp_path):
    attacks = [
        {"name": "dager", "knowledge": ["K3", "updates"]},
        {"name": "vocabulary-search", "knowledge": "K2"},
    ]
    told_of = {"attacks": attacks, "share_updates": True}
    alone = run(told("words", **told_of), plugins=pm)
    e = told("words", **told_of, update_batch=2, isolation="process")
    shared = run(e, plugins=pm, out=tmp_path, keep_evidence=True)
    assert grades(shared)["vocabulary-search"] == grades(alone)["vocabulary-search"]
    found = grades(shared)["dager"]
    assert found["attack_performance"] == 1.0
    assert found["floors"]["others"] > found["floors"]["prior"]
    assert found["verdict"] == "ok"
    (row,) = [row for row in shared.numbers["undefended"]["strongest"] if row["attack"] == "dager"][
        :1
    ]
    assert row["knowledge"] == "K3 + updates"
    again = attack_again(tmp_path, e.attacks[:1], plugins=pm, isolation="inline")
    assert again["undefended"][0].attack_performance == 1.0
    assert again["undefended"][0].floors == found["floors"]


def test_the_positive_control_of_an_attack_on_batches_is_of_batches(pm):
    """The shift moves what crosses, and the head's gradient with it: dager reads the head's own inputs all the same."""
    attacks = [{"name": "dager", "knowledge": ["K3", "updates"]}]
    e = told("words", attacks=attacks, share_updates=True, update_batch=2)
    table = {**e.to_dict(), "defenses": [{"name": "shift", "options": {"by": 0.5}}]}
    (grade,) = grades(run(experiment_from(table), plugins=pm), "defended").values()
    assert (grade["attack_performance"], grade["positive_control"]) == (1.0, 1.0)
    assert grade["reference"] == 1.0


@pytest.mark.slow
def test_gradient_matching_runs_the_whole_model_in_the_worker_and_beats_its_floor(pm):
    attacks = [
        {"name": "dlg-updates", "knowledge": ["K3", "updates"], "options": {"iterations": 150}}
    ]
    e = told("words", attacks=attacks, share_updates=True, count=12, isolation="process")
    (grade,) = grades(run(e, plugins=pm)).values()
    assert grade["attack_performance"] > grade["floor"] + 0.1
    assert grade["verdict"] == "ok"


def test_members_are_told_from_texts_that_were_never_used(pm):
    attacks = [{"name": "membership-residual", "knowledge": ["K3", "candidates", "updates"]}]
    e = told("words", attacks=attacks, share_updates=True, candidates=12)
    (grade,) = grades(run(e, plugins=pm)).values()
    assert (grade["target"], grade["attack_performance"]) == ("members", 1.0)
    assert grade["details"]["auc"] == 1.0
    assert grade["floor"] == pytest.approx(0.5, abs=0.06)


def test_the_positive_control_of_a_label_attack_leaves_out_what_was_told(pm):
    e = told(
        attacks=[{"name": "label-completion", "knowledge": ["K0", "known_labels"]}],
        count=16,
        known=10,
    )
    table = {**e.to_dict(), "defenses": [{"name": "shift", "options": {"by": 0.5}}]}
    (grade,) = grades(run(experiment_from(table), plugins=pm), "defended").values()
    assert grade["positive_control"] is not None
    assert grade["positive_control"] * 4 == pytest.approx(round(grade["positive_control"] * 4))


@pytest.mark.parametrize(
    ("attack", "hint"),
    [
        ("dager", "share_updates = true"),
        ("direction-scoring", "victims.known"),
        ("membership-residual", "updates"),
    ],
)
def test_what_the_experiment_does_not_make_is_missed_before_anything_runs(pm, attack, hint):
    knowledge = ["K4", "known_labels", "candidates", "updates"]
    with pytest.raises(ExperimentError, match=hint):
        run(told(attacks=[{"name": attack, "knowledge": knowledge}]), plugins=pm)


@pytest.mark.parametrize(
    ("victims", "words"),
    [
        ({"share_updates": True, "phase": "inference"}, "at inference there is no gradient"),
        ({"known": 12}, "two victims must be left"),
        ({"candidates": 3}, "even number"),
    ],
)
def test_impossible_victims_are_refused_with_the_reason(victims, words):
    with pytest.raises((ExperimentError, AttackError), match=words):
        told(attacks=[], **victims)
