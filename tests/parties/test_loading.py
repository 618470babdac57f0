"""Each party loads its own half of a checkpoint, and the two compute what the whole one computes."""

from __future__ import annotations

import gc
import json

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
)

from vflair_core import Example, LocalChannel, Partition, load_data_party, load_model_party, merge
from vflair_core.communication.message import reply
from vflair_core.errors import CheckpointError
from vflair_core.testing import tiny_batch, tiny_model

NARROW = {"intermediate_size": 32, "num_key_value_heads": 1}
MODELS = {
    "gpt2": ("gpt2", "causal-lm", {}),
    "llama": ("llama", "causal-lm", {}),
    "gemma": ("gemma", "causal-lm", {**NARROW, "head_dim": 8}),
    "mixtral": ("mixtral", "causal-lm", {**NARROW, "num_local_experts": 4}),
    "bert": ("bert", "classification", {}),
    "bert-mlm": ("bert", "masked-lm", {}),
}


@pytest.fixture
def saved(tmp_path):
    """A factory: saved(name) writes a tiny model in shards; returns it and its folder."""

    def make(name="llama", **overrides):
        kind, task, options = MODELS[name]
        model = tiny_model(kind, task, **options, **overrides)
        model.save_pretrained(tmp_path / name, max_shard_size="20KB")
        return model, tmp_path / name

    return make


def load(folder, partition, **options):
    model_party = load_model_party(folder, partition, **options)
    handle = model_party.handle
    data_party = load_data_party(folder, partition, channel=handle, wire=True, **options)
    return data_party, model_party


def batch_for(model):
    labels = "classes" if "Classification" in type(model).__name__ else "tokens"
    return tiny_batch(model, padding="right", labels=labels)


@pytest.mark.parametrize("tail", [1, 0], ids=["HBT", "HT"])
@pytest.mark.parametrize("name", MODELS)
def test_the_loaded_halves_compute_the_whole_model_bit_for_bit(saved, name, tail):
    whole, folder = saved(name)
    data_party, model_party = load(folder, Partition(1, tail))
    batch = batch_for(whole)
    expected, ours = whole(**batch), data_party.model(**batch, use_cache=False)
    assert torch.equal(ours.logits, expected.logits)
    assert torch.equal(ours.loss, expected.loss)
    expected.loss.backward()
    ours.loss.backward()
    theirs = dict(data_party.named_parameters()) | dict(model_party.named_parameters())
    tied = {"transformer.wte.weight", "model.embed_tokens.weight"}
    tied |= {"bert.embeddings.word_embeddings.weight"}
    for key, weight in whole.named_parameters():
        if weight.grad is not None and not (data_party.untied and key in tied):
            worst = (theirs[key].grad - weight.grad).abs().max()
            assert worst <= 1e-6 * weight.grad.abs().max(), key


@pytest.mark.parametrize("tail", [1, 0], ids=["HBT", "HT"])
@pytest.mark.parametrize("name", MODELS)
def test_each_party_holds_its_own_weights_and_no_other(saved, name, tail):
    whole, folder = saved(name)
    data_party, model_party = load(folder, Partition(1, tail))
    ours = dict(data_party.named_parameters())
    theirs = dict(model_party.named_parameters())
    untied = set(data_party.untied)
    expected = dict(whole.named_parameters(remove_duplicate=False))
    assert not ours.keys() & theirs.keys()
    assert (ours.keys() | theirs.keys()) - untied == dict(whole.named_parameters()).keys()
    assert data_party.order == tuple(dict(whole.named_parameters()))
    for key, weight in (ours | theirs).items():
        assert not weight.is_meta
        assert torch.equal(weight, expected[key]), key
    count = sum(expected[key].numel() for key in untied)
    total = sum(p.numel() for p in [*ours.values(), *theirs.values()])
    assert total == whole.num_parameters() + count


SMALL = {"vocab_size": 64, "pad_token_id": 0}
STACKS = {
    "t5": (
        AutoModelForSeq2SeqLM,
        {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 4, "num_heads": 2},
    ),
    "albert": (
        AutoModelForSequenceClassification,
        {
            "embedding_size": 8,
            "hidden_size": 16,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "intermediate_size": 32,
        },
    ),
}


@pytest.mark.parametrize("tail", [1, 0], ids=["HBT", "HT"])
@pytest.mark.parametrize("kind", STACKS)
def test_models_with_two_stacks_or_shared_blocks_load_and_join_alike(tmp_path, kind, tail):
    auto, sizes = STACKS[kind]
    extra = {"decoder_start_token_id": 0} if kind == "t5" else {}
    whole = auto.from_config(AutoConfig.for_model(kind, **SMALL, **sizes, **extra)).eval()
    whole.save_pretrained(tmp_path / "whole")
    data_party, model_party = load(tmp_path / "whole", Partition(1, tail))
    batch = tiny_batch(whole, labels="tokens" if kind == "t5" else "classes")
    assert torch.equal(data_party.model(**batch).logits, whole(**batch).logits)
    data_party.save(tmp_path)
    model_party.save(tmp_path)
    found = type(whole).from_pretrained(merge(tmp_path, tmp_path, tmp_path / "out")).state_dict()
    expected = whole.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("side", ["data", "model"])
def test_no_tensor_of_the_process_holds_the_other_partys_weights(saved, side):
    marks = {"data": 7.0, "model": 9.0}

    def saved_with_marks():
        whole, folder = saved("mixtral")
        for key, weight in whole.named_parameters():
            owner = "model" if ".layers.1." in key or ".layers.2." in key else "data"
            weight.data.fill_(marks[owner])
        whole.save_pretrained(folder)
        return folder

    folder = saved_with_marks()
    partition = Partition(1, 1)
    if side == "data":
        agreed = load_model_party(folder, partition).fingerprint
        gc.collect()
        facts = {"step": 0, "moved": 0}
        party = load_data_party(
            folder, partition, channel=lambda message: reply(message, meta=facts)
        )
        assert party.connection.fingerprint == agreed
    else:
        party = load_model_party(folder, partition)
    other = marks["model" if side == "data" else "data"]
    gc.collect()
    alive = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
    held = [
        t for t in alive if not t.is_meta and t.dim() > 1 and t.numel() and bool((t == other).all())
    ]
    assert held == []
    assert len(list(party.parameters())) > 0


def test_a_tied_head_is_read_from_the_embeddings_untied_and_named(saved):
    whole, folder = saved("gpt2")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert "lm_head.weight" not in index["weight_map"]
    data_party, model_party = load(folder, Partition(1, 0))
    assert data_party.untied == ("lm_head.weight",)
    theirs = dict(model_party.named_parameters())
    assert torch.equal(theirs["lm_head.weight"], whole.transformer.wte.weight)
    assert "transformer.wte.weight" not in theirs
    load_hbt, _ = load(folder, Partition(1, 1))
    assert load_hbt.untied == ()
    assert load_hbt.model.lm_head.weight is load_hbt.model.transformer.wte.weight


def test_dtype_is_that_of_the_whole_model_loaded_alike(saved):
    _, folder = saved("llama")
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    data_party, model_party = load(folder, Partition(1, 1), dtype=torch.bfloat16)
    assert {p.dtype for p in model_party.parameters()} == {torch.bfloat16}
    batch = batch_for(whole)
    assert torch.equal(data_party.model(**batch).logits, whole(**batch).logits)


def test_options_of_the_config_and_of_reading_reach_from_pretrained(saved):
    whole, folder = saved("bert", num_labels=3)
    options = {"attn_implementation": "eager", "hidden_dropout_prob": 0.5, "device_map": "cpu"}
    data_party, model_party = load(folder, Partition(1, 1), **options)
    assert data_party.model.config._attn_implementation == "eager"
    dropouts = {m.p for m in model_party.model.modules() if isinstance(m, torch.nn.Dropout)}
    assert 0.5 in dropouts
    assert data_party.model.num_labels == whole.num_labels == 3


def test_generation_with_a_cache_gives_the_tokens_of_the_whole_model(saved):
    whole, folder = saved("llama")
    data_party, _ = load(folder, Partition(1, 1))
    prompt = {key: tiny_batch(whole)[key] for key in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(
        data_party.model.generate(**prompt, **options), whole.generate(**prompt, **options)
    )


def test_a_head_that_the_checkpoint_lacks_starts_at_random_when_named(saved):
    whole, folder = saved("llama")
    chosen = {"auto": AutoModelForSequenceClassification, "num_labels": 3}
    data_party, model_party = load(folder, Partition(1, 1), new=["score"], **chosen)
    assert data_party.model.score.weight.shape == (3, 16)
    ours = dict(data_party.named_parameters()) | dict(model_party.named_parameters())
    expected = dict(whole.named_parameters())
    assert set(ours) - set(expected) == {"score.weight"}
    assert all(torch.equal(ours[key], expected[key]) for key in set(ours) & set(expected))


def test_a_hub_model_is_named_by_the_commit_of_its_revision(saved, tmp_path):
    whole, folder = saved("llama")
    commit, cache = "c0ffee" * 6 + "beef", tmp_path / "hub"
    snapshot = cache / "models--me--tiny" / "snapshots" / commit
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    refs = cache / "models--me--tiny" / "refs"
    refs.mkdir()
    (refs / "v2").write_text(commit)
    options = {"cache_dir": cache, "revision": "v2"}
    data_party, model_party = load("me/tiny", Partition(1, 1), **options)
    assert f"weights=commit:{commit}" in model_party.fingerprint
    batch = batch_for(whole)
    assert torch.equal(data_party.model(**batch).logits, whole(**batch).logits)


def words(*more):
    vocabulary = {word: number for number, word in enumerate(["<u>", "red", "green", *more])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<u>"))
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<u>", pad_token="<u>")


def test_the_tokenizer_beside_the_weights_is_taken_unless_another_is_given(saved):
    _, folder = saved("llama")
    model_party = load_model_party(folder, Partition(1, 1))
    options = {"channel": model_party.handle, "partition": Partition(1, 1)}
    assert load_data_party(folder, **options).tokenizer is None
    words().save_pretrained(folder)
    data_party = load_data_party(folder, **options)
    assert data_party.tokenizer.get_vocab() == words().get_vocab()
    assert data_party.encode([Example("green")], max_length=4)["input_ids"][0, 0] == 2
    own = words("blue")
    assert load_data_party(folder, tokenizer=own, **options).tokenizer is own


def test_a_tokenizer_that_cannot_be_read_is_no_missing_one(saved):
    _, folder = saved("llama")
    words().save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{")
    model_party = load_model_party(folder, Partition(1, 1))
    with pytest.raises(CheckpointError, match=r"cannot be read.*Pass tokenizer="):
        load_data_party(folder, Partition(1, 1), channel=model_party.handle)


def test_an_open_channel_serves_as_well_as_a_handle(saved):
    whole, folder = saved("llama")
    model_party = load_model_party(folder, Partition(1, 1))
    channel = LocalChannel(model_party.handle)
    data_party = load_data_party(folder, Partition(1, 1), channel=channel)
    batch = batch_for(whole)
    assert torch.equal(data_party.model(**batch).logits, whole(**batch).logits)
    assert data_party.channel is channel


@pytest.mark.filterwarnings("ignore")  # of bitsandbytes, about the processor
def test_a_quantised_model_party_computes_what_a_whole_model_with_those_blocks_quantised_does(
    saved,
):
    pytest.importorskip("bitsandbytes")
    _, folder = saved("llama", hidden_size=64)
    ours = ["lm_head", "model.layers.0", "model.layers.3"]
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=ours)
    whole = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    quantised = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    model_party = load_model_party(folder, Partition(1, 1), **quantised)
    data_party = load_data_party(folder, Partition(1, 1), channel=model_party.handle)
    assert any(p.dtype == torch.int8 for p in model_party.parameters())
    assert all(p.dtype == torch.float32 for p in data_party.parameters())
    batch = batch_for(whole)
    assert torch.equal(data_party.model(**batch).logits, whole(**batch).logits)
    with pytest.raises(CheckpointError, match=r"Quantised weights .* are not saved in parts"):
        model_party.save(folder.parent / "part")
    assert not (folder.parent / "part").exists()
