"""A field of [model] config that the model does not have is refused by name, for every type that is listed."""

from __future__ import annotations

import dataclasses

import pytest
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

from support.paths import SAMPLE_PLUGIN
from support.small_models import LLAMA
from vflair_core import experiment_from, load_data_party, load_model_party, plugin_manager, run
from vflair_core.errors import CheckpointError, ExperimentError
from vflair_core.experiments.base_model import random_model
from vflair_core.parties.config_fields import check_class, check_fields, check_model_type
from vflair_core.parties.verified_models import VERIFIED
from vflair_core.partition.partition import Partition
from vflair_core.tasks.tokenizer_training import train_tokenizer
from vflair_core.testing import tiny_model

TYPES = sorted({line.partition(" ")[0] for line in VERIFIED})
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 64}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["some words of a text"], vocab_size=300)


def build(config, tokenizer):
    pictures = config["model_type"] == "llava"
    auto = AutoModelForImageTextToText if pictures else AutoModelForCausalLM
    return random_model(auto, config, tokenizer, {})


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({**LLAMA, "hiden_size": 16}, "'hiden_size'. Did you mean 'hidden_size'"),
        ({**GPT2, "n_layers": 4}, "'n_layers'. Did you mean 'n_layer'"),
        ({**GPT2, "num_hiden_layers": 4}, "'num_hiden_layers'. Did you mean 'num_hidden_layers'"),
        ({**GPT2, "rope_theta": 1e4}, "config of gpt2 has no field 'rope_theta'"),
        (
            {**LLAMA, "num_attention_heads": 3},
            "model.config: .*not a multiple of the number of attention",
        ),
        ({**LLAMA, "vocab_size": 99}, "vocab_size comes from the tokenizer.*model.vocab_size"),
        ({**LLAMA, "hidden_size": "16"}, "model.config: .*hidden_size"),
        ({**LLAMA, "model_type": "lama"}, "no model type 'lama'.*Did you mean 'l?lama"),
        (
            {
                "model_type": "llava",
                "text_config": {**LLAMA, "hiden_size": 8},
                "vision_config": VISION,
            },
            "config of llama has no field 'text_config.hiden_size'",
        ),
        (
            {"model_type": "llava", "text_config": LLAMA, "vision_config": {**VISION, "depht": 8}},
            "has no field 'vision_config.depht'",
        ),
        (
            {
                "model_type": "llava",
                "hidden_size": 99,
                "text_config": LLAMA,
                "vision_config": VISION,
            },
            "config of llava has no field 'hidden_size'",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else value["model_type"],
)
def test_a_field_that_does_not_exist_is_refused_with_what_was_meant(tokenizer, config, said):
    with pytest.raises(ExperimentError, match=said) as raised:
        build(config, tokenizer)
    assert len(str(raised.value)) < 400  # and not a list of all that there is


def test_a_type_that_has_no_model_for_the_task_is_told_without_a_list_of_all_that_have(tokenizer):
    with pytest.raises(ExperimentError, match="AutoModelForCausalLM") as raised:
        random_model(AutoModelForCausalLM, {"model_type": "t5"}, tokenizer, {})
    assert len(str(raised.value)) < 300


def test_fields_go_by_the_name_of_the_class_and_by_that_of_all_models(tokenizer):
    own = build(GPT2, tokenizer).config
    of_all = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    same = build({"model_type": "gpt2", **of_all, "max_position_embeddings": 64}, tokenizer).config
    assert own.to_dict() == same.to_dict()
    scaled = {**LLAMA, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e3}}
    assert build(scaled, tokenizer).config.rope_parameters["factor"] == 2.0
    before = {
        **LLAMA,
        "rope_theta": 5e3,
        "attn_implementation": "eager",
        "tie_word_embeddings": True,
    }
    model = build(before, tokenizer)
    assert model.config.rope_parameters["rope_theta"] == 5e3


@pytest.mark.parametrize("kind", TYPES)
def test_no_field_of_a_listed_type_is_refused(kind):
    assert check_model_type(kind) == ""
    config = AutoConfig.for_model(kind)
    given = config.to_dict()
    again = type(config)(**given)
    assert check_fields(again, given) == ""
    own = [field.name for field in dataclasses.fields(config)]
    assert check_class(type(config), dict.fromkeys([*own, *config.attribute_map])) == ""
    assert "hiden_size" in check_class(type(config), {"hiden_size": 3})


def test_no_field_of_any_type_that_can_be_cut_is_refused():
    refused = {}
    for kind, config_class in CONFIG_MAPPING.items():
        fields = [field.name for field in dataclasses.fields(config_class)]
        wrong = check_class(config_class, dict.fromkeys([*fields, *config_class.attribute_map]))
        if wrong or not check_class(config_class, {"hiden_size": 3}):
            refused[kind] = wrong or "took hiden_size"
    assert not refused


def test_a_run_says_so_before_anything_is_trained():
    e = experiment_from(
        {
            "task": {"name": "words"},
            "model": {"config": {**LLAMA, "hiden_size": 32}, "vocab_size": 300},
            "pretrain": {"steps": 100_000},
        }
    )
    with pytest.raises(ExperimentError, match=r"model.config: .*Did you mean 'hidden_size'"):
        run(e, plugins=plugin_manager([SAMPLE_PLUGIN], entry_point_group="none"))


def test_an_override_of_a_pretrained_model_is_checked_in_the_same_way(tmp_path):
    tiny_model("gpt2").save_pretrained(tmp_path)
    for key, meant in (("n_layers", "n_layer"), ("hiden_size", "hidden_size"), ("dtpye", "dtype")):
        with pytest.raises(CheckpointError, match=f"no option '{key}'.*Did you mean '{meant}'"):
            load_model_party(tmp_path, Partition(1, 1), **{key: 8})
    with pytest.raises(CheckpointError, match="no option 'hiden_size'"):
        load_data_party(tmp_path, Partition(1, 1), channel="local:", hiden_size=8)
    with pytest.raises(ValueError, match=r"no field 'hiden_size'.*'hidden_size'"):
        tiny_model("llama", hiden_size=8)
