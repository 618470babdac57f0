"""The examples keep their promises, with fewer steps: they need all three plugin packages."""

from __future__ import annotations

import pytest

from support.paths import EXAMPLES
from vflair_core import plugin_manager, read_experiment, run

SHORTER = ["pretrain.steps=60", "train.steps=60", "victims.count=4", "victims.bypass=2"]


@pytest.mark.slow
def test_the_toy_learns_leaks_and_is_defended():
    e = read_experiment(EXAMPLES / "toy.toml", [*SHORTER, "victims.max_length=24"])
    numbers = run(e, plugins=plugin_manager()).numbers
    undefended, defended = numbers["undefended"], numbers["defended"]
    first, last = (undefended["evaluations"][n]["metrics"]["loss"] for n in (0, -1))
    assert last <= 0.9 * first
    assert undefended["unsplit_losses_equal"] is True
    search = {arm: numbers[arm]["attacks"][0] for arm in ("undefended", "defended")}
    assert search["undefended"]["attack_performance"] == 1.0
    assert search["defended"]["attack_performance"] < 0.9
    assert search["defended"]["positive_control"] == 1.0
    assert all(grade["verdict"] == "ok" for grade in search.values())
    (promise,) = defended["guarantees"]
    assert promise["epsilon"] > promise["epsilon_per_release"] > 0


@pytest.mark.slow
def test_labels_cross_in_ht_classification_and_the_report_shows_it():
    e = read_experiment(EXAMPLES / "chapters.toml", [*SHORTER, "victims.count=8"])
    numbers = run(e, plugins=plugin_manager()).numbers
    sign = numbers["undefended"]["attacks"][0]
    assert (sign["attack"], sign["knowledge"]) == ("gradient-sign", "K0")
    assert sign["attack_performance"] == 1.0
    assert numbers["defended"]["covers"] == ["prompt", "response"]
    assert numbers["defended"]["attacks"][0]["attack_performance"] == 1.0


@pytest.mark.slow
def test_a_cheating_model_party_reads_what_a_watching_one_cannot():
    """The head starts random and secret: at K1 nobody reads it, unless its training is hijacked."""
    shorter = ["train.steps=120", "victims.count=8", "isolation=inline"]
    numbers = run(
        read_experiment(EXAMPLES / "hijacking.toml", shorter), plugins=plugin_manager()
    ).numbers
    (watching,) = numbers["undefended"]["attacks"]
    nearest, hijacking = numbers["active-undefended"]["attacks"]
    assert watching["attack_performance"] < 0.1
    assert hijacking["attack_performance"] > 0.3
    assert nearest["attack_performance"] > 0.3
    assert numbers["active-undefended"]["main_performance"] < numbers["undefended"]["main_performance"]  # fmt: skip
