"""A peft adapter of the whole model in both halves: peft on the unsplit model is the witness."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from vflair_core import (
    Lora,
    Partition,
    load_adapter,
    load_data_party,
    load_model_party,
    merge,
    split,
    tune,
)
from vflair_core.errors import CheckpointError, PartitionError
from vflair_core.testing import tiny_batch, tiny_model

CUTS = [Partition(1, 1), Partition(1, 0)]
TASKS = {"bert": "classification", "t5": "seq2seq"}
METHODS = {
    "gpt2": peft.LoraConfig(r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
    "llama": peft.LoraConfig(
        r=4,
        use_dora=True,
        target_modules=["q_proj", "up_proj"],
        rank_pattern={"q_proj": 2},
        layers_to_transform=[0, 1, 3],
    ),
    "bert": peft.LoraConfig(
        r=2, target_modules=["query", "value"], modules_to_save=["classifier"], task_type="SEQ_CLS"
    ),
    "t5": peft.IA3Config(target_modules=["k", "v", "wi"], feedforward_modules=["wi"]),
}

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning",
    "ignore:fan_in_fan_out is set to:UserWarning",
)


def adapted(model, config, seed=0, name="default"):
    model = peft.get_peft_model(model, copy.deepcopy(config), adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    return model


def written(kind, folder, seed=0):
    """A whole model with an adapter, and where the adapter was written."""
    whole = tiny_model(kind, TASKS.get(kind, "causal-lm"))
    plain = copy.deepcopy(whole)
    model = adapted(whole, METHODS[kind], seed).eval()
    model.save_pretrained(folder)
    return plain, model


def outputs(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def batch_for(model):
    batch = tiny_batch(model)
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = batch["input_ids"][:, :4]
    return batch


@pytest.mark.parametrize("partition", CUTS, ids=lambda partition: partition.kind)
@pytest.mark.parametrize("kind", sorted(METHODS))
def test_it_gives_what_peft_gives_on_the_whole_model(kind, partition, tmp_path):
    plain, model = written(kind, tmp_path)
    batch = batch_for(plain)
    expected, before = outputs(model, batch), outputs(plain, batch)
    data_party, model_party = split(copy.deepcopy(plain), partition)
    load_adapter(data_party, model_party, tmp_path)
    assert torch.equal(outputs(data_party.model, batch), expected)
    assert not torch.allclose(expected, before, atol=1e-3)
    with data_party.without_adapters():
        assert torch.equal(outputs(data_party.model, batch), before)
    assert not any(w.requires_grad for o in (data_party, model_party) for w in o.parameters())


def test_a_second_one_has_a_name_of_its_own(tmp_path):
    plain, first = written("llama", tmp_path / "first")
    _, second = written("llama", tmp_path / "second", seed=1)
    batch = tiny_batch(plain)
    data_party, model_party = split(copy.deepcopy(plain), Partition(1, 1))
    load_adapter(data_party, model_party, tmp_path / "first")
    with pytest.raises(CheckpointError, match="name='second'"):
        load_adapter(data_party, model_party, tmp_path / "second")
    load_adapter(data_party, model_party, tmp_path / "second", name="second")
    assert torch.equal(outputs(data_party.model, batch), outputs(second, batch))
    for layer in data_party.model.modules():
        if isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer):
            layer.set_adapter("default")
    assert torch.equal(outputs(data_party.model, batch), outputs(first, batch))


def test_one_that_is_trained_further_takes_pefts_steps(tmp_path):
    plain, _ = written("gpt2", tmp_path)
    batch = tiny_batch(plain, labels="tokens")
    data_party, model_party = split(copy.deepcopy(plain), Partition(1, 1))
    load_adapter(data_party, model_party, tmp_path, trainable=True)
    whole = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path, is_trainable=True)
    whole.eval()(**batch).loss.backward()
    data_party.model.eval()(**batch).loss.backward()
    ours = dict([*data_party.named_parameters(), *model_party.named_parameters()])
    trained = {n: w for n, w in whole.base_model.model.named_parameters() if w.requires_grad}
    assert trained.keys() == {n for n, w in ours.items() if w.requires_grad}
    assert all(torch.equal(ours[name].grad, weight.grad) for name, weight in trained.items())


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_each_party_loads_its_half_beside_its_checkpoint(kind, tmp_path):
    plain, _ = written(kind, tmp_path / "adapter")
    plain.save_pretrained(tmp_path / "base")
    batch, place = tiny_batch(plain), {"adapter": tmp_path / "adapter"}
    model_party = load_model_party(tmp_path / "base", Partition(1, 1), **place)
    data_party = load_data_party(
        tmp_path / "base", Partition(1, 1), channel=model_party.handle, **place
    )
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    expected = outputs(peft.PeftModel.from_pretrained(whole, tmp_path / "adapter").eval(), batch)
    assert torch.equal(outputs(data_party.model, batch), expected)


def test_a_chain_of_model_parties_loads_it_each_its_share(tmp_path):
    plain, model = written("gpt2", tmp_path / "adapter")
    plain.save_pretrained(tmp_path / "base")
    cut, place = Partition(1, 1), {"adapter": tmp_path / "adapter"}
    last = load_model_party(tmp_path / "base", cut, share=(1, None), **place)
    first = load_model_party(tmp_path / "base", cut, share=(0, 1), onward=last.handle, **place)
    data_party = load_data_party(tmp_path / "base", cut, channel=first.handle, **place)
    batch = tiny_batch(plain)
    assert torch.allclose(outputs(data_party.model, batch), outputs(model, batch), atol=1e-6)


@pytest.mark.parametrize("what", ["other model", "other width", "prompt", "nothing"])
def test_what_does_not_fit_changes_nothing(what, tmp_path):
    plain = tiny_model("llama")
    if what == "other model":
        written("gpt2", tmp_path)
    elif what == "other width":
        adapted(tiny_model("llama", hidden_size=32), METHODS["llama"]).save_pretrained(tmp_path)
    elif what == "prompt":
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        peft.get_peft_model(copy.deepcopy(plain), config).save_pretrained(tmp_path)
    batch = tiny_batch(plain)
    expected = outputs(plain, batch)
    data_party, model_party = split(copy.deepcopy(plain), Partition(1, 1))
    before = [n for o in (data_party, model_party) for n, _ in o.model.named_modules()]
    why = {
        "other model": "no party holds the module",
        "other width": "does not fit this model",
        "prompt": r"PeftModel\.from_pretrained\(data_party\.model, folder\)",
        "nothing": "There is no adapter at",
    }
    with pytest.raises(CheckpointError, match=why[what]):
        load_adapter(data_party, model_party, tmp_path)
    assert [n for o in (data_party, model_party) for n, _ in o.model.named_modules()] == before
    assert torch.equal(outputs(data_party.model, batch), expected)


def test_a_deeper_adapter_than_the_model_is_refused(tmp_path):
    adapted(
        tiny_model("llama", num_hidden_layers=6), peft.LoraConfig(r=2, target_modules=["q_proj"])
    ).save_pretrained(tmp_path)
    data_party, model_party = split(tiny_model("llama"), Partition(1, 1))
    with pytest.raises(CheckpointError, match="no party holds the module of 4 of its 12 weights"):
        load_adapter(data_party, model_party, tmp_path)


@pytest.mark.parametrize(
    "load",
    [
        lambda party, folder: peft.PeftModel.from_pretrained(party.model, folder),
        lambda party, folder: party.model.load_adapter(str(folder)),
        lambda party, _: party.model.load_state_dict(
            tiny_model("llama").state_dict(), strict=False
        ),
    ],
    ids=["PeftModel", "load_adapter", "load_state_dict"],
)
def test_half_of_it_is_not_loaded_without_a_word(load, tmp_path):
    written("llama", tmp_path)
    data_party, _ = split(tiny_model("llama"), Partition(1, 1))
    with pytest.raises(PartitionError, match="load_adapter"):
        load(data_party, tmp_path)


def test_an_adapter_in_place_of_a_model_is_refused_by_name(tmp_path):
    written("llama", tmp_path / "adapter")
    for load in (load_model_party, lambda name: load_data_party(name, channel=lambda m: m)):
        with pytest.raises(CheckpointError, match="is an adapter, not a model"):
            load(tmp_path / "adapter")


def test_what_two_parties_trained_can_be_merged_and_loaded_again(tmp_path):
    plain = tiny_model("llama")
    data_party, model_party = split(copy.deepcopy(plain), Partition(1, 1))
    for owner in (data_party, model_party):
        tune(owner, adapters=Lora(r=2))
        with torch.no_grad():
            for name, weight in owner.named_parameters():
                if "lora_B" in name:
                    weight.normal_()
    data_party.save(tmp_path / "data")
    model_party.save(tmp_path / "model")
    merge(tmp_path / "data", tmp_path / "model", tmp_path / "joined", adapter=True, base=plain)
    again = split(copy.deepcopy(plain), Partition(1, 1))
    load_adapter(*again, tmp_path / "joined")
    batch = tiny_batch(plain)
    assert torch.equal(outputs(again[0].model, batch), outputs(data_party.model, batch))


@pytest.mark.parametrize("partition", CUTS, ids=lambda partition: partition.kind)
@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"]),
        peft.LoraConfig(
            r=2, target_modules=["q_proj"], layers_to_transform=[0], modules_to_save=["lm_head"]
        ),
        peft.LoraConfig(
            r=2, target_modules=["q_proj"], layers_to_transform=[1, 2], modules_to_save=["norm"]
        ),
    ],
    ids=["ends of names", "adapters in the head only", "adapters in the body only"],
)
def test_modules_in_place_of_others_go_on_and_off_with_the_adapter(config, partition, tmp_path):
    plain = tiny_model("llama", tie_word_embeddings=False)
    model = adapted(copy.deepcopy(plain), config).eval()
    model.save_pretrained(tmp_path)
    batch = tiny_batch(plain)
    data_party, model_party = split(copy.deepcopy(plain), partition)
    load_adapter(data_party, model_party, tmp_path)
    assert torch.equal(outputs(data_party.model, batch), outputs(model, batch))
    with data_party.without_adapters():
        assert torch.equal(outputs(data_party.model, batch), outputs(plain, batch))
    assert torch.equal(outputs(data_party.model, batch), outputs(model, batch))


def test_half_an_adapter_is_refused(tmp_path):
    data_party, _ = split(tiny_model("llama"), Partition(1, 1))
    half = peft.get_peft_model(data_party.model, peft.LoraConfig(target_modules=["q_proj"]))
    half.save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"lacks weights for 2 modules.*vflair merge --adapter"
    ):
        load_adapter(*split(tiny_model("llama"), Partition(1, 1)), tmp_path)


@pytest.mark.parametrize("broken", ["weights", "sort", "empty", "list"])
def test_a_broken_adapter_is_one(broken, tmp_path):
    written("llama", tmp_path)
    config = tmp_path / "adapter_config.json"
    match broken:
        case "weights":
            path = tmp_path / "adapter_model.safetensors"
            path.write_bytes(path.read_bytes()[:50])
        case "sort":
            config.write_text(config.read_text().replace('"LORA"', '"NONE_SUCH"'))
        case "empty":
            config.write_text("{}")
        case _:
            config.write_text("[]")
    with pytest.raises(CheckpointError, match="adapter"):
        load_adapter(*split(tiny_model("llama"), Partition(1, 1)), tmp_path)
