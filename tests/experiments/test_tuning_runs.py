"""Experiments that train slices or adapters: the unsplit model's steps, and attacks on what comes of it."""

from __future__ import annotations

import pytest

from support.paths import SAMPLE_PLUGIN
from vflair_core import plugin_manager, run
from vflair_core.errors import ExperimentError
from vflair_core.experiments.config import experiment_from, read_experiment, to_toml

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA = {"model_type": "llama", "intermediate_size": 32, "num_key_value_heads": 2, **SIZES}
GPT2 = {"model_type": "gpt2", **SIZES}
TRAIN = {"steps": 4, "batch_size": 4, "max_length": 16, "learning_rate": 0.01, "clip": 0.1}
BLOCK = 4 * 16 * 16 + 3 * 16 * 32 + 2 * 16  # numbers of one llama block
LORA_OF_BLOCK = 2 * (4 * 32 + 3 * 48)  # rank 2: 16 → 16 four times, 16 ↔ 32 three times


@pytest.fixture
def pm():
    return plugin_manager([SAMPLE_PLUGIN], entry_point_group="vflair.none")


def small(config=LLAMA, *, tail=1, train=None, **changes):
    return experiment_from(
        {
            "task": {"name": "words"},
            "model": {"config": config, "vocab_size": 300},
            "partition": {"head": 1, "tail": tail},
            "train": {**TRAIN, **(train or {})},
            "victims": {"count": 4, "max_length": 12, "bypass": 2, "queries": 2},
            "isolation": "inline",
            **changes,
        }
    )


@pytest.mark.parametrize("tail", [0, 1], ids=["HT", "HBT"])
@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize(
    "train",
    [
        {},
        {"lora": {"r": 2, "dropout": 0.1}},
        {"trainable": ["data_party"]},
        {"trainable": ["data_party"], "lora": {"r": 2, "full": ["task_head"]}},
    ],
    ids=["full vanilla", "full lora", "local vanilla", "local lora"],
)
def test_the_four_ways_of_the_paper_take_the_unsplit_models_steps(pm, config, tail, train):
    if tail == 0 and "full" in train.get("lora", {}):
        train = {**train, "lora": {"r": 2}}
    result = run(small(config, tail=tail, train=train, check_unsplit=True), plugins=pm)
    numbers = result.numbers["undefended"]
    assert numbers["unsplit_losses_equal"] is True
    assert len(set(numbers["losses"])) == TRAIN["steps"]
    local = train.get("trainable") == ["data_party"]
    assert (numbers["trained_weights"]["model_party"] == 0) is local


def test_the_weights_that_are_trained_are_counted(pm):
    def counts(**train):
        return run(small(train={"steps": 0, **train}), plugins=pm).numbers["undefended"][
            "trained_weights"
        ]

    assert counts(trainable=["body"]) == {"data_party": 0, "model_party": BLOCK}
    assert counts(trainable=["blocks.0"]) == {"data_party": BLOCK, "model_party": 0}
    lora = counts(lora={"r": 2})
    assert lora == {"data_party": 2 * LORA_OF_BLOCK, "model_party": LORA_OF_BLOCK}


@pytest.mark.parametrize("trainable", ["head", "tail"])
def test_attacks_get_the_weights_with_their_adapters_merged(pm, trainable):
    """The attack `which-weights` reports through its budget whether a half has moved in training."""
    train = {"lora": {"r": 2}, "trainable": [trainable], "learning_rate": 0.1}
    attacks = [{"name": "which-weights", "knowledge": "K4"}]
    result = run(small(train=train, attacks=attacks), plugins=pm)
    moved = result.numbers["undefended"]["attacks"][0]["budget"]
    assert {name for name in ("head", "tail") if moved[name]} == {trainable}


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ({"trainable": ["boddy"]}, r"train\S*: There is no slice 'boddy'. Did you mean 'body'"),
        ({"lora": {"rank": 2}}, r"train\.lora\.rank: there is no such key"),
        ({"lora": {"r": 2, "full": ["heads"]}}, "There is no slice 'heads'. Did you mean 'head'"),
        ({"lora": {"r": -1}}, r"train\.lora"),
    ],
    ids=["slice", "key", "full", "rank"],
)
def test_a_mistake_in_the_file_is_named(train, words):
    with pytest.raises(ExperimentError, match=words):
        small(train=train)


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ({"trainable": ["blocks.3"]}, "no slice 'blocks.3'. Did you mean 'blocks"),
        ({"trainable": []}, "leave nothing to train at either party"),
        ({"lora": {"r": 2, "target_modules": ["c_attn"]}}, "goes by 'c_attn'"),
    ],
    ids=["block", "nothing", "layer"],
)
def test_a_choice_that_does_not_fit_the_model_is_named(pm, train, words):
    with pytest.raises(ExperimentError, match=words):
        run(small(train=train), plugins=pm)


def test_an_experiment_with_adapters_is_written_and_read_back(tmp_path):
    experiment = small(train={"trainable": ["head", "blocks.1"], "lora": {"r": 4, "alpha": 8}})
    path = tmp_path / "experiment.toml"
    path.write_text(to_toml(experiment))
    assert read_experiment(path) == experiment
