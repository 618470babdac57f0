"""Experiment files: read back what was written, and say precisely what does not fit."""

from __future__ import annotations

import pytest

from support.paths import EXAMPLES
from vflair_core import read_experiment
from vflair_core.errors import ExperimentError, PartitionError
from vflair_core.experiments.config import experiment_from, to_toml

SMALL = {"task": {"name": "t"}, "model": {"config": {"model_type": "llama"}}}


def mistake(table) -> str:
    with pytest.raises(ExperimentError) as error:
        experiment_from(table)
    return str(error.value)


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.toml")), ids=lambda f: f.stem)
def test_every_example_reads_and_survives_being_written(file, tmp_path):
    experiment = read_experiment(file)
    again = tmp_path / "again.toml"
    again.write_text(to_toml(experiment))
    assert read_experiment(again) == experiment
    assert read_experiment(again).digest == experiment.digest


def test_a_misspelt_key_says_where_and_what_was_meant():
    said = mistake({**SMALL, "train": {"stepz": 3}})
    assert "train.stepz: there is no such key. Did you mean 'steps'" in said


def test_a_wrong_type_says_what_was_expected_and_given():
    assert "train.steps: expected int, got '3'" in mistake({**SMALL, "train": {"steps": "3"}})
    assert "seed: expected int, got True" in mistake({**SMALL, "seed": True})


def test_a_missing_key_is_named():
    assert "task" in mistake({"model": SMALL["model"]})


def test_all_mistakes_are_listed_at_once():
    said = mistake({**SMALL, "seeds": 1, "train": {"stepz": 3}, "attacks": [{"nam": "x"}]})
    assert "seeds" in said
    assert "train.stepz" in said
    assert "attacks.0.nam" in said


def test_an_impossible_cut_and_an_impossible_number_are_explained_with_their_key():
    assert "partition: head must be a whole number of blocks >= 0" in mistake(
        {**SMALL, "partition": {"head": -1}}
    )
    assert "batch_size' must be >= 1" in mistake({**SMALL, "train": {"batch_size": 0}})


def test_a_model_needs_a_name_or_a_config_and_not_both():
    assert "[model] needs either name" in mistake({"task": {"name": "t"}, "model": {}})
    assert "needs a model_type" in mistake({"task": {"name": "t"}, "model": {"config": {"n": 1}}})


def test_overrides_change_single_keys_and_refuse_nonsense(tmp_path):
    file = EXAMPLES / "toy.toml"
    changed = read_experiment(file, ["train.steps=7", "attacks.0.knowledge=K2", "task.name=other"])
    assert (changed.train.steps, changed.attacks[0].knowledge, changed.task.name) == (
        7,
        "K2",
        "other",
    )
    with pytest.raises(ExperimentError, match="is not key=value"):
        read_experiment(file, ["train.steps"])
    with pytest.raises(ExperimentError, match="There is no experiment file"):
        read_experiment(tmp_path / "none.toml")


def test_a_digest_tells_experiments_apart():
    first = experiment_from(SMALL)
    assert first.digest == experiment_from(SMALL).digest
    assert first.digest != experiment_from({**SMALL, "seed": 1}).digest


def test_partition_errors_keep_their_own_type_outside_files():
    from vflair_core import Partition

    with pytest.raises(PartitionError, match="whole number of blocks"):
        Partition(head=True)


@pytest.mark.parametrize("key", ["attacks.9.name", "attacks.a.name", "seed.deeper"])
def test_an_override_of_something_that_is_not_there_is_refused(key):
    with pytest.raises(ExperimentError, match="there is no such table or entry"):
        read_experiment(EXAMPLES / "toy.toml", [f"{key}=x"])


def test_a_word_where_a_table_belongs_is_refused():
    with pytest.raises(ExperimentError, match="task: expected a table of keys"):
        read_experiment(EXAMPLES / "toy.toml", ["task=word"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train": {"optimizer": "adamW"}}, "train.optimizer: there is no 'adamW'. Did you mean 'adamw'? Possible: sgd, adam, adamw"),
        ({"victims": {"split": "tset"}}, "victims.split: there is no 'tset'. Did you mean 'test'? Possible: train, test"),
        ({"isolation": 1}, "isolation: there is no 1. Possible: process, inline"),
        ({"victms": {}}, "Did you mean 'victims'? Possible: victims, "),
    ],
)  # fmt: skip
def test_a_value_that_is_not_one_of_a_few_is_answered_with_what_was_meant(change, said):
    with pytest.raises(ExperimentError) as raised:
        experiment_from({"task": {"name": "t"}, "model": {"name": "m"}, **change})
    assert said in str(raised.value)
