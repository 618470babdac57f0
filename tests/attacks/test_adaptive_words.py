"""The adaptive contract of an attack on words: through a replacement that it knows, and not without."""

from __future__ import annotations

import attrs
import pytest

import vflair_attacks
import vflair_defenses
from support.paths import WORD_SWAPS
from vflair_core import plugin_manager, run
from vflair_core.errors import AttackError
from vflair_core.experiments.attack_phase import attack_again
from vflair_core.experiments.config import experiment_from
from vflair_core.experiments.experiment import AttackSpec


@pytest.fixture
def pm():
    manager = plugin_manager([WORD_SWAPS], entry_point_group="vflair.none")
    manager.register(vflair_attacks)
    manager.register(vflair_defenses)
    return manager


def experiment(*defenses, knowledge=("K3", "K4"), model="llama", **victims):
    sizes = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
        "max_position_embeddings": 64, "initializer_range": 0.3,
    }  # fmt: skip
    return experiment_from(
        {
            "task": {"name": "sequences"},
            "model": {"vocab_size": 400, "config": {"model_type": model, **sizes}},
            "partition": {"head": 1, "tail": 1},
            "train": {"steps": 2, "max_length": 24},
            "victims": {"count": 12, "queries": 0, **victims},
            "threads": 1,
            "defenses": defenses,
            "attacks": [{"name": "replacement-inversion", "knowledge": k} for k in knowledge],
        }
    )


def performances(result, arm="defended"):
    return [row["attack_performance"] for row in result.numbers[arm]["attacks"]]


def test_a_known_replacement_hides_no_word_and_an_unknown_one_all(pm, tmp_path):
    """Every word has another in its place; a word is right by chance in one of twelve places. And so once more, from files."""
    result = run(experiment({"name": "swap-words"}), plugins=pm, out=tmp_path, keep_evidence=True)
    assert performances(result, "undefended") == [1.0, 1.0]
    blind, knowing = performances(result)
    assert knowing >= 0.99
    assert blind <= 0.45  # in their order, and not at their places, some are there after all
    assert result.numbers["defended"]["evaluated"] == {"tokens": True}
    assert all(row["positive_control"] == 1.0 for row in result.numbers["defended"]["attacks"])
    spec = AttackSpec("replacement-inversion", {}, "K4")
    again = attack_again(tmp_path, [spec], plugins=pm, isolation="inline")
    assert again["defended"][0].attack_performance == knowing


@pytest.mark.parametrize("name", ["santext", "santext-plus", "custext", "custext-plus", "rantext"])
def test_each_defense_of_text_can_be_told_to_an_attacker(pm, name):
    e = experiment({"name": name, "options": {"epsilon": 20.0}}, knowledge=("K4",), count=6)
    e = attrs.evolve(e, isolation="inline")
    numbers = run(e, plugins=pm).numbers["defended"]
    assert numbers["evaluated"] == {"tokens": True}
    assert numbers["attacks"][0]["adaptive"]


def test_one_replacement_after_another_is_refused_by_name(pm):
    twice = {"name": "swap-words"}, {"name": "custext"}
    e = attrs.evolve(experiment(*twice, knowledge=("K4",), count=4), isolation="inline")
    with pytest.raises(AttackError, match="2 defenses of this run replace words"):
        run(e, plugins=pm)


def test_more_releases_of_other_words_say_more(pm):
    noisy = {"name": "swap-words", "options": {"noise": 0.3}}
    found = []
    for releases in (1, 4):
        e = experiment(noisy, knowledge=("K4",), count=8, releases=releases)
        found += performances(run(attrs.evolve(e, isolation="inline"), plugins=pm))
    assert found[1] >= max(found[0], 0.95)
