"""Kept evidence is attacked again without either party, and what was found before is found again."""

from __future__ import annotations

import json

import pytest

import vflair_defenses
from support.paths import SAMPLE_PLUGIN
from support.small_models import LLAMA
from vflair_attacks import vflair_attacks as offered
from vflair_core import AttackError, hookimpl, plugin_manager, run
from vflair_core.attacks.evidence import needed
from vflair_core.errors import ExperimentError
from vflair_core.experiments.attack_phase import KEY, attack_again
from vflair_core.experiments.build import make_launches
from vflair_core.experiments.config import experiment_from
from vflair_core.experiments.experiment import AttackSpec
from vflair_core.experiments.grading.answer_key import AnswerKey

ATTACKS = (
    AttackSpec("vocabulary-search", {"beam": 2}, "K4"),
    AttackSpec("inverter", {"steps": 3}, ("K1", "queries")),
    AttackSpec("nearest-embedding", {}, "K1"),
)


@pytest.fixture(scope="module")
def pm():
    class Attacks:
        @hookimpl
        def vflair_attacks(self):
            return offered()

    manager = plugin_manager([SAMPLE_PLUGIN], entry_point_group="vflair.none")
    manager.register(Attacks())
    manager.register(vflair_defenses)
    return manager


def experiment(attacks):
    return experiment_from(
        {
            "seed": 3,
            "task": {"name": "words"},
            "model": {"config": LLAMA, "vocab_size": 300},
            "partition": {"head": 1, "tail": 1},
            "train": {"steps": 2, "batch_size": 4, "max_length": 16},
            "victims": {"count": 6, "max_length": 12, "bypass": 2, "queries": 8, "development": 2},
            "defenses": [{"name": "mid"}],
            "isolation": "inline",
            "attacks": [
                {"name": a.name, "options": a.options, "knowledge": a.knowledge} for a in attacks
            ],
        }
    )


@pytest.fixture(scope="module")
def kept(pm, tmp_path_factory):
    """One run with only the last attack, which needs neither queries nor the tokenizer's file."""
    folder = tmp_path_factory.mktemp("run")
    run(experiment(ATTACKS[2:]), plugins=pm, out=folder, keep_evidence=True)
    return folder


def test_attacks_that_come_later_get_the_grades_of_a_run_that_had_them(kept, pm):
    whole = run(experiment(ATTACKS), plugins=pm)
    again = attack_again(kept, ATTACKS, plugins=pm, isolation="inline")
    for arm in ("undefended", "defended"):
        there = whole.numbers[arm]["attacks"]
        for then, now in zip(there, again[arm], strict=True):
            assert now.numbers() == then


def test_the_answer_key_comes_back_as_it_was(kept, tmp_path):
    path = kept / "evidence-defended" / KEY
    AnswerKey.load(path).save(tmp_path / "copy.json")
    assert json.loads((tmp_path / "copy.json").read_text()) == json.loads(path.read_text())
    assert json.loads(path.read_text())["truth"]["texts"][0]


def test_the_truth_is_in_no_file_that_an_attack_can_be_given(kept, pm):
    files = needed(make_launches(ATTACKS, pm, 0))
    assert KEY not in files
    for launch in make_launches(ATTACKS, pm, 0):
        assert KEY not in needed([launch])


def test_what_the_run_did_not_make_is_named(kept, pm):
    with pytest.raises(AttackError, match="dager needs updates, which this run did not make"):
        attack_again(kept, [AttackSpec("dager", {}, ("K3", "updates"))], plugins=pm)


def test_a_run_without_evidence_is_refused(pm, tmp_path):
    with pytest.raises(AttackError, match="--keep-evidence"):
        attack_again(tmp_path, ATTACKS, plugins=pm)
    with pytest.raises(ExperimentError, match="--out"):
        run(experiment(ATTACKS[2:]), plugins=pm, keep_evidence=True)


@pytest.mark.parametrize("isolation", ["inline", "process"])
def test_who_watches_sees_how_much_is_recovered_so_far(kept, pm, isolation):
    """Nothing defends the undefended arm and the head is known: the share grows to all of it."""
    heard = []
    grades = attack_again(
        kept,
        [AttackSpec("vocabulary-search", {"group": 2}, "K4")],
        plugins=plugin_manager(),
        isolation=isolation,
        report=lambda *told: heard.append(told),
    )
    shares = [
        float(phase.rpartition("recovered ")[2])
        for phase, _, _ in heard
        if phase.startswith("undefended: vocabulary-search (main), recovered")
    ]
    assert grades["undefended"][0].attack_performance == 1.0
    assert 0 <= shares[0] < 1
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
