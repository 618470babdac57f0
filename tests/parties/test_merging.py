"""What both parties saved becomes, joined, the checkpoint that the unsplit model would have given."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig

from vflair_core import Partition, load_data_party, load_model_party, merge, split
from vflair_core.errors import CheckpointError
from vflair_core.partition.checkpoint import read_part, write_part
from vflair_core.tasks.tokenizer_training import train_tokenizer
from vflair_core.testing import tiny_batch, tiny_model
from vflair_core.training.fine_tuning import FineTuning, Train, train_unsplit

NARROW = {"intermediate_size": 32, "num_key_value_heads": 1}
MODELS = {
    "gpt2": ("causal-lm", {}),
    "llama": ("causal-lm", {}),
    "mixtral": ("causal-lm", {**NARROW, "num_local_experts": 4}),
    "bert": ("classification", {}),
}
OPTIONS = Train(steps=3, learning_rate=0.01)


def make(kind):
    task, options = MODELS[kind]
    return tiny_model(kind, task, **options)


def batches(model):
    labels = "classes" if "Classification" in type(model).__name__ else "tokens"
    return [tiny_batch(model, padding="right", labels=labels, seed=n) for n in range(3)]


def untied(model):
    """The whole model as HT cuts it: with a task head of its own."""
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    return model


def trained(data_party, whole):
    """Train both alike."""
    torch.manual_seed(7)
    expected = train_unsplit(whole, batches(whole), OPTIONS)
    torch.manual_seed(7)
    run = FineTuning(data_party, OPTIONS)
    assert [run.step(batch) for batch in batches(whole)] == expected


def joined(data_party, model_party, folder, **options):
    data_party.save(folder / "data")
    model_party.save(folder / "model")
    return merge(folder / "data", folder / "model", folder / "out", **options)


def assert_equal_models(found, expected):
    assert type(found) is type(expected)
    ours, theirs = found.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    batch = batches(expected)[0]
    assert torch.equal(found.eval()(**batch).logits, expected.eval()(**batch).logits)


@pytest.mark.parametrize("tail", [1, 0], ids=["HBT", "HT"])
@pytest.mark.parametrize("kind", MODELS)
def test_joined_halves_equal_the_unsplit_model_trained_alike(tmp_path, kind, tail):
    data_party, model_party = split(make(kind), Partition(1, tail))
    whole = untied(make(kind)) if data_party.untied else make(kind)
    trained(data_party, whole)
    out = joined(data_party, model_party, tmp_path)
    found, info = type(whole).from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_equal_models(found, whole)
    assert GenerationConfig.from_pretrained(out) if whole.can_generate() else True


@pytest.mark.parametrize("tail", [1, 0], ids=["HBT", "HT"])
@pytest.mark.parametrize("kind", MODELS)
def test_halves_that_were_only_loaded_join_to_the_files_they_came_from(tmp_path, kind, tail):
    make(kind).save_pretrained(tmp_path / "whole")
    model_party = load_model_party(tmp_path / "whole", Partition(1, tail))
    handle = model_party.handle
    data_party = load_data_party(tmp_path / "whole", Partition(1, tail), channel=handle)
    out = joined(data_party, model_party, tmp_path)
    before = load_file(tmp_path / "whole" / "model.safetensors")
    after = load_file(out / "model.safetensors")
    assert before.keys() == after.keys()  # Mixtral's experts are apart again
    assert all(torch.equal(before[name], after[name]) for name in before)
    configs = [
        json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "whole", out)
    ]
    assert configs[0] == configs[1]


def test_the_tokenizer_comes_along(tmp_path):
    tokenizer = train_tokenizer(["the harbour opens at six"], 300)
    model = tiny_model("llama", vocab_size=len(tokenizer))
    data_party, model_party = split(model, Partition(1, 1), tokenizer=tokenizer)
    out = joined(data_party, model_party, tmp_path)
    text = "the harbour"
    assert AutoTokenizer.from_pretrained(out)(text).input_ids == tokenizer(text).input_ids


def test_of_a_run_the_last_step_that_both_hold_is_joined(tmp_path):
    data_party, model_party = split(make("llama"), Partition(1, 1))
    model_party.checkpoints = tmp_path / "theirs"
    whole = make("llama")
    run = FineTuning(data_party, OPTIONS)
    expected = []
    for batch in batches(whole):
        run.step(batch)
        run.save(tmp_path / "ours")
        weights = [*data_party.named_parameters(), *model_party.named_parameters()]
        expected.append({name: weight.detach().clone() for name, weight in weights})
    shutil.rmtree(tmp_path / "ours" / "step-00000003")
    out = merge(tmp_path / "ours", tmp_path / "theirs", tmp_path / "out")
    found = type(whole).from_pretrained(out).state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in expected[1].items())


@pytest.fixture
def saved(tmp_path):
    """A trained pair, saved to tmp_path / data and model."""
    data_party, model_party = split(make("llama"), Partition(1, 1))
    run = FineTuning(data_party, OPTIONS)
    run.step(batches(make("llama"))[0])
    data_party.save(tmp_path / "data")
    model_party.save(tmp_path / "model")
    return run, model_party


def refused(folder, words, *, data="data", model="model", **options):
    with pytest.raises(CheckpointError, match=words):
        merge(folder / data, folder / model, folder / "out", **options)
    assert not list(folder.glob("out*"))


def test_parts_of_different_steps_are_refused(tmp_path, saved):
    run, _ = saved
    run.step(batches(make("llama"))[1])
    run.party.save(tmp_path / "later")
    refused(tmp_path, "are of different steps: 2 against 1", data="later")


def test_parts_of_two_runs_are_refused(tmp_path, saved):
    data_party, _ = split(make("llama"), Partition(1, 1))
    FineTuning(data_party, OPTIONS).step(batches(make("llama"))[0])
    data_party.save(tmp_path / "other")
    refused(tmp_path, "steps: 1 against 0, in which this run took none", data="other")


@pytest.mark.parametrize(
    ("model", "partition", "words"),
    [
        (tiny_model("llama", seed=1), Partition(1, 1), "two models: weights=sample:"),
        (tiny_model("llama"), Partition(2, 1), "two models: head=2 against head=1"),
    ],
    ids=["weights", "cut"],
)
def test_parts_of_two_models_are_refused(tmp_path, saved, model, partition, words):
    split(model, partition)[0].save(tmp_path / "other")
    refused(tmp_path, words, data="other")


def test_a_part_that_lacks_a_weight_is_refused(tmp_path, saved):
    path = tmp_path / "model" / "model_party.safetensors"
    facts, weights = read_part(path)
    del weights["model.layers.1.mlp.up_proj.weight"]
    write_part(path, weights, facts)
    refused(tmp_path, r"1 weights are missing and 0 unknown, model\.layers\.1\.mlp\.up_proj")


def test_folders_in_the_wrong_order_or_without_parts_are_refused(tmp_path, saved):
    refused(tmp_path, r"There is no data_party\.safetensors in", data="model", model="data")
    refused(
        tmp_path, r"no model_party\.safetensors in .*nowhere: model_party\.save", model="nowhere"
    )


def test_a_file_that_is_no_part_is_refused(tmp_path, saved):
    path = tmp_path / "data" / "data_party.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    refused(tmp_path, "is not a party's part of a checkpoint")
    path.write_bytes(b"no tensors")
    refused(tmp_path, "cannot be read")


def test_a_folder_that_is_there_is_not_overwritten(tmp_path, saved):
    out = tmp_path / "taken"
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(CheckpointError, match="taken is there already"):
        merge(tmp_path / "data", tmp_path / "model", out)
    assert [path.name for path in out.iterdir()] == ["mine"]


def test_an_adapter_is_not_made_of_weights(tmp_path, saved):
    refused(tmp_path, "There is no adapter in these parts", adapter=True)


def test_half_a_model_points_to_merging_when_it_is_asked_to_save_itself(tmp_path, saved):
    run, _ = saved
    with pytest.raises(Exception, match="`vflair merge` joins"):
        run.party.model.save_pretrained(tmp_path / "half")
    assert not (tmp_path / "half").exists()


def test_a_failure_while_writing_leaves_nothing(tmp_path, saved, monkeypatch):
    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr("vflair_core.parties.merge._write_tokenizer", full)
    with pytest.raises(OSError, match="disk full"):
        merge(tmp_path / "data", tmp_path / "model", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_model_is_not_changed_by_being_saved(tmp_path):
    data_party, _ = split(make("gpt2"), Partition(1, 0))
    before = copy.deepcopy(dict(data_party.named_parameters()))
    data_party.save(tmp_path)
    assert all(torch.equal(before[name], p) for name, p in data_party.named_parameters())
