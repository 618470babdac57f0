"""What cannot be loaded, or does not fit the other party, is refused by name before anything is sent."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

from vflair_core import Partition, load_data_party, load_model_party, split
from vflair_core.errors import CheckpointError, PartitionError, ProtocolError
from vflair_core.testing import tiny_model


@pytest.fixture
def folder(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.fixture
def model_party(folder):
    return load_model_party(folder, Partition(1, 1))


def nobody(message):
    raise AssertionError(f"{message.kind} was sent")


@pytest.mark.parametrize("loader", [load_model_party, load_data_party])
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / "config.json").unlink(), "There is no model at the folder"),
        (lambda f: (f / "model.safetensors").unlink(), "holds no weights. Needed: model.saf"),
        (lambda f: (f / "config.json").write_text('{"model_type": "lama"}'), "There is no model"),
    ],
    ids=["no config", "no weights", "unknown type"],
)
def test_a_folder_that_is_no_checkpoint_says_what_one_needs(folder, loader, spoil, words):
    spoil(folder)
    options = {"channel": nobody} if loader is load_data_party else {}
    with pytest.raises(CheckpointError, match=words):
        loader(folder, Partition(1, 1), **options)


def test_a_name_that_neither_hub_nor_disk_knows_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="There is no model at 'me/nothing', hub or folder"):
        load_model_party("me/nothing", Partition(1, 1), cache_dir=tmp_path)


def test_a_weight_that_is_missing_is_named_to_the_party_that_lacks_it_only(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 weights.*layers\.1\.mlp\.up_proj"):
        load_model_party(folder, Partition(1, 1))
    lent = load_model_party(folder, Partition(2, 1)).handle
    data_party_has_it = pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj")
    with data_party_has_it:
        load_data_party(folder, Partition(2, 1), channel=lent)


def test_a_head_that_the_checkpoint_lacks_is_not_made_up_unasked(folder):
    chosen = {"auto": AutoModelForSequenceClassification, "channel": nobody}
    with pytest.raises(CheckpointError, match=r"score\.weight.*LlamaForCausalLM.*new=\['score'\]"):
        load_data_party(folder, Partition(1, 1), **chosen)


def test_a_weight_of_another_shape_is_refused(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_model_party(folder, Partition(1, 1))


def test_an_impossible_cut_names_the_legal_range(folder):
    with pytest.raises(PartitionError, match=r"2 \+ 2 of 4 blocks.*between 0 and 3"):
        load_model_party(folder, Partition(2, 2))


def test_an_option_that_does_not_exist_is_named(folder):
    with pytest.raises(CheckpointError, match=r"no option 'dtpye'.*Did you mean 'dtype'"):
        load_model_party(folder, Partition(1, 1), dtpye="float32")


def test_a_config_without_a_known_class_asks_for_one(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["MyLlama"]}))
    with pytest.raises(CheckpointError, match=r"\['MyLlama'\]\). Say which to load with: auto="):
        load_model_party(folder, Partition(1, 1))


def test_parties_with_another_cut_are_told_both(folder, model_party):
    with pytest.raises(ProtocolError, match="has head=2 against head=1 at the model party"):
        load_data_party(folder, Partition(2, 1), channel=model_party.handle)


def test_parties_with_other_weights_are_told_both(tmp_path, model_party):
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ProtocolError, match=r"has weights=files:\w+ against weights=files:\w+ at"):
        load_data_party(tmp_path / "other", Partition(1, 1), channel=model_party.handle)


def test_parties_with_another_dtype_are_told_both(folder, model_party):
    channel = model_party.handle
    with pytest.raises(ProtocolError, match="dtype=bfloat16 against dtype=float32"):
        load_data_party(folder, Partition(1, 1), channel=channel, dtype=torch.bfloat16)


def test_parties_with_another_class_are_told_both(folder, model_party):
    with pytest.raises(ProtocolError, match="model=LlamaForSequenceClassification against model="):
        load_data_party(
            folder,
            Partition(1, 1),
            channel=model_party.handle,
            auto=AutoModelForSequenceClassification,
            new=["score"],
        )


def test_a_folder_and_its_copy_are_the_same_weights(folder, model_party):
    folder.rename(folder.with_name("elsewhere"))
    channel = model_party.handle
    assert load_data_party(folder.with_name("elsewhere"), Partition(1, 1), channel=channel)


def test_models_split_in_memory_with_other_weights_have_other_fingerprints():
    prints = [
        split(tiny_model("llama", seed=seed), Partition(1, 1))[1].fingerprint for seed in (0, 0, 1)
    ]
    assert prints[0] == prints[1] != prints[2]


def test_a_url_that_nobody_opens_is_refused(folder):
    with pytest.raises(ProtocolError, match="No plugin opens the channel 'carrier://there'"):
        load_data_party(folder, Partition(1, 1), channel="carrier://there")


def test_quantisation_without_its_library_is_refused_by_name(folder):
    config = BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(CheckpointError, match="bitsandbytes"):
        load_model_party(folder, Partition(1, 1), quantization_config=config)


def test_a_model_in_a_parallel_wrapper_is_refused_by_name():
    with pytest.raises(PartitionError, match=r"inside DataParallel.*split\(model\.module"):
        split(nn.DataParallel(tiny_model("llama")), Partition(1, 1))


@pytest.mark.parametrize("name", ["FSDPModule", "FullyShardedDataParallel", "OptimizedModule"])
def test_a_model_with_a_wrapped_block_is_refused_by_name(name):
    model = tiny_model("llama")
    block = model.model.layers[1]
    block.__class__ = type("Wrapped", (type(name, (), {}), type(block)), {})
    with pytest.raises(PartitionError, match=f"inside {name}"):
        split(model, Partition(1, 1))


def test_a_quantised_model_is_refused_with_the_way_that_works(monkeypatch):
    model = tiny_model("llama")
    config = BitsAndBytesConfig(load_in_8bit=True)
    model.hf_quantizer = type("Quantiser", (), {"quantization_config": config})()
    with pytest.raises(PartitionError, match=r"bitsandbytes has quantised.*load_model_party"):
        split(model, Partition(1, 1))
