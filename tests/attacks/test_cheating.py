"""Whole runs with attackers that cheat: each ends at the floor, is refused, or finds nothing to take."""

from __future__ import annotations

import pytest

import vflair_defenses
from support.paths import CHEATING_ATTACKS, SAMPLE_PLUGIN
from support.small_models import LLAMA
from vflair_core import plugin_manager, run
from vflair_core.experiments.config import experiment_from

WIDE = {**LLAMA, "initializer_range": 1.0}


@pytest.fixture
def pm():
    manager = plugin_manager([SAMPLE_PLUGIN, CHEATING_ATTACKS], entry_point_group="vflair.none")
    manager.register(vflair_defenses)
    return manager


def grade_of(pm, attack, *, defense=None, isolation="process"):
    table = {
        "task": {"name": "words"},
        "model": {"config": WIDE, "vocab_size": 300},
        "partition": {"head": 0, "tail": 1},
        "train": {"steps": 0, "batch_size": 4, "max_length": 16},
        "victims": {"count": 8, "max_length": 16, "phase": "inference"},
        "attacks": [{"name": attack, "knowledge": "K4"}],
        "defenses": [defense] if defense else [],
        "isolation": isolation,
    }
    result = run(experiment_from(table), plugins=pm)
    (grade,) = result.numbers["defended" if defense else "undefended"]["attacks"]
    return grade


def test_naming_the_whole_vocabulary_scores_no_more_than_the_floor(pm):
    grade = grade_of(pm, "whole-vocabulary")
    assert grade["attack_performance"] <= grade["floor"]
    assert "uninformative" in grade["verdict"]


def test_naming_the_whole_vocabulary_does_not_even_fill_the_bag(pm):
    """A guess has one token per position, so a longer row is cut to the victim's length."""
    grade = grade_of(pm, "whole-vocabulary")
    assert grade["details"]["bag_recall"] < 0.5


def test_constant_tokens_score_no_more_than_the_floor(pm):
    grade = grade_of(pm, "constant")
    assert grade["attack_performance"] <= grade["floor"]
    assert "uninformative" in grade["verdict"]


def test_the_truth_is_not_in_the_process_of_the_attack(pm):
    grade = grade_of(pm, "look-around")
    assert grade["attack_performance"] <= grade["floor"]


def test_the_same_search_finds_the_truth_where_it_is(pm):
    """Inline, attack and truth share a process; so the cheat works, and the test above can fail."""
    assert grade_of(pm, "look-around", isolation="inline")["attack_performance"] == 1.0


def test_the_cores_noise_cannot_be_drawn_again_from_a_guessed_seed(pm):
    noise = {"name": "gaussian-noise", "options": {"noise_multiplier": 2.0}}
    grade = grade_of(pm, "guess-the-seed", defense=noise)
    assert grade["attack_performance"] <= grade["floor"] + 0.1


def test_noise_from_a_guessable_seed_is_drawn_again_and_taken_off(pm):
    """The same attack on a defense that seeds itself: all tokens are found, so the test above can fail."""
    noise = {"name": "fixed-noise", "options": {"sigma": 20.0}}
    assert grade_of(pm, "guess-the-seed", defense=noise)["attack_performance"] == 1.0
