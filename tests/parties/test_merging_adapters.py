"""Two parties' adapters become one: merged into the weights, or as one adapter that peft reads whole."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model

from vflair_core import Partition, load_data_party, load_model_party, merge, split
from vflair_core.errors import CheckpointError
from vflair_core.testing import tiny_batch, tiny_model
from vflair_core.training.fine_tuning import FineTuning, Train, train_unsplit

# peft 0.21 asks transformers 5.23 by a name that transformers deprecates.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
OPTIONS = Train(steps=3, learning_rate=0.02, clip=0.0)


def lora(kind, **options):
    targets = ["c_attn", "c_proj"] if kind == "gpt2" else ["q_proj", "down_proj"]
    if kind == "bert":
        targets = ["query", "output.dense"]
    known = {"target_modules": targets, "fan_in_fan_out": kind == "gpt2", "r": 4, "lora_alpha": 8}
    return LoraConfig(**{**known, **options})


def batches(model):
    labels = "classes" if "Classification" in type(model).__name__ else "tokens"
    return [tiny_batch(model, padding="right", labels=labels, seed=n) for n in range(3)]


def adapted_alike(whole, data_party, model_party):
    """Give the whole model the adapters of both parties, as they start."""
    own = dict(data_party.named_parameters()) | dict(model_party.named_parameters())
    with torch.no_grad():
        for name, weight in whole.named_parameters():
            if "lora_" in name:
                weight.copy_(own[name])


@pytest.fixture
def base(tmp_path):
    def make(kind="llama", task="causal-lm"):
        model = tiny_model(kind, task)
        model.save_pretrained(tmp_path / "base")
        return model

    return make


def load(folder, partition):
    model_party = load_model_party(folder / "base", partition)
    data_party = load_data_party(folder / "base", partition, channel=model_party.handle)
    return data_party, model_party


def train(data_party, whole):
    torch.manual_seed(7)
    expected = train_unsplit(whole, batches(whole), OPTIONS)
    torch.manual_seed(7)
    run = FineTuning(data_party, OPTIONS)
    losses = [run.step(batch) for batch in batches(whole)]
    assert losses == pytest.approx(expected, rel=1e-6)
    return losses == expected


def save(folder, data_party, model_party):
    data_party.save(folder / "data")
    model_party.save(folder / "model")
    return folder / "data", folder / "model"


@pytest.mark.parametrize("tail", [1, 0], ids=["HBT", "HT"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_merged_adapters_equal_those_of_the_unsplit_model_bit_for_bit(base, tmp_path, kind, tail):
    whole = base(kind)
    data_party, model_party = load(tmp_path, Partition(1, tail))
    get_peft_model(data_party.model, lora(kind))
    inject_adapter_in_model(lora(kind), model_party.model)
    wrapped = get_peft_model(whole, lora(kind))
    adapted_alike(whole, data_party, model_party)
    frozen = [n for n, p in whole.named_parameters() if "lora_" not in n and p.requires_grad]
    assert not frozen
    assert train(data_party, whole)
    parts = save(tmp_path, data_party, model_party)
    assert (parts[1] / "model_party.safetensors").stat().st_size < 40_000  # adapters only

    out = merge(*parts, tmp_path / "adapter", adapter=True)
    alone = PeftModel.from_pretrained(tiny_model(kind), out)
    batch = batches(whole)[0]
    assert torch.equal(alone.eval()(**batch).logits, whole.eval()(**batch).logits)
    config = json.loads((out / "adapter_config.json").read_text())
    paths = {n.partition(".lora_")[0] for n, _ in whole.named_parameters() if ".lora_" in n}
    assert set(config["target_modules"]) == paths

    merged = type(whole).from_pretrained(merge(*parts, tmp_path / "merged"))
    expected = wrapped.merge_and_unload()
    for name, weight in merged.named_parameters():
        assert torch.equal(weight, dict(expected.named_parameters())[name]), name
    assert torch.equal(merged(**batch).logits, expected.eval()(**batch).logits)


def test_ranks_and_scales_that_differ_are_kept_apart(base, tmp_path):
    whole = base()
    data_party, model_party = load(tmp_path, Partition(1, 1))
    inject_adapter_in_model(lora("llama", r=2, lora_alpha=16), data_party.model)
    inject_adapter_in_model(lora("llama", r=4, lora_alpha=4), model_party.model)
    run = FineTuning(data_party, OPTIONS)
    for batch in batches(whole):
        run.step(batch)
    parts = save(tmp_path, data_party, model_party)
    out = merge(*parts, tmp_path / "adapter", adapter=True)
    alone = PeftModel.from_pretrained(whole, out).eval()
    batch = batches(whole)[0]
    data_party.model.eval()
    assert torch.equal(alone(**batch).logits, data_party.model(**batch).logits)


@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "merged"])
def test_the_adapter_of_one_party_joins_the_frozen_weights_of_the_other(base, tmp_path, adapter):
    whole = base()
    data_party, model_party = load(tmp_path, Partition(1, 1))
    inject_adapter_in_model(lora("llama"), data_party.model)
    model_party.model.requires_grad_(requires_grad=False)
    FineTuning(data_party, OPTIONS).step(batches(whole)[0])
    out = merge(*save(tmp_path, data_party, model_party), tmp_path / "out", adapter=adapter)
    batch = batches(whole)[0]
    expected = data_party.model.eval()(**batch).logits
    if adapter:
        config = json.loads((out / "adapter_config.json").read_text())
        assert config["modules_to_save"] is None
        assert torch.equal(PeftModel.from_pretrained(whole, out).eval()(**batch).logits, expected)
    else:
        found = type(whole).from_pretrained(out)(**batch).logits
        assert torch.allclose(found, expected, atol=1e-4)
        assert not torch.equal(found, whole(**batch).logits)


@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "merged"])
@pytest.mark.parametrize("how", ["unfrozen", "modules_to_save"])
def test_a_head_that_was_trained_beside_adapters_comes_along(base, tmp_path, how, adapter):
    whole = base("bert", "classification")
    data_party, model_party = load(tmp_path, Partition(1, 1))
    saved = ["classifier"] if how == "modules_to_save" else None
    inject_adapter_in_model(lora("bert", modules_to_save=saved), data_party.model)
    inject_adapter_in_model(lora("bert"), model_party.model)
    if how == "unfrozen":
        data_party.model.classifier.requires_grad_(requires_grad=True)
    run = FineTuning(data_party, OPTIONS)
    for batch in batches(whole):
        run.step(batch)
    before = whole.classifier.weight.clone()
    out = merge(*save(tmp_path, data_party, model_party), tmp_path / "out", adapter=adapter)
    found = PeftModel.from_pretrained(whole, out) if adapter else type(whole).from_pretrained(out)
    batch = batches(tiny_model("bert", "classification"))[0]
    expected = data_party.model.eval()(**batch).logits
    assert torch.allclose(found.eval()(**batch).logits, expected, atol=1e-5)
    if adapter:
        assert torch.equal(found(**batch).logits, expected)
    else:
        assert not torch.equal(found.classifier.weight, before)


def test_a_tied_head_that_was_adapted_is_untied_in_the_merged_weights(tmp_path):
    model = tiny_model("gpt2")
    model.save_pretrained(tmp_path / "base")
    data_party, model_party = load(tmp_path, Partition(1, 0))
    inject_adapter_in_model(lora("gpt2"), data_party.model)
    head = lora("gpt2", target_modules=["lm_head"], fan_in_fan_out=False)
    inject_adapter_in_model(head, model_party.model)
    own = dict(model_party.named_parameters())
    low, high = own["lm_head.lora_A.default.weight"], own["lm_head.lora_B.default.weight"]
    torch.nn.init.normal_(high)
    parts = save(tmp_path, data_party, model_party)
    found = type(model).from_pretrained(merge(*parts, tmp_path / "out"))
    embeddings = model.transformer.wte.weight
    assert torch.equal(found.transformer.wte.weight, embeddings)
    expected = embeddings + (8 / 4) * high @ low  # alpha over r
    assert torch.allclose(found.lm_head.weight, expected, atol=1e-5)
    with pytest.raises(CheckpointError, match="trained apart, which an adapter cannot say"):
        merge(*parts, tmp_path / "adapter", adapter=True)
    assert not (tmp_path / "adapter").exists()


def test_a_model_split_in_memory_is_given_as_the_base(tmp_path):
    model = tiny_model("llama")
    data_party, model_party = split(copy.deepcopy(model), Partition(1, 1))
    for party in (data_party, model_party):
        inject_adapter_in_model(lora("llama"), party.model)
    FineTuning(data_party, OPTIONS).step(batches(model)[0])
    parts = save(tmp_path, data_party, model_party)
    with pytest.raises(CheckpointError, match=r"no name\. Say which: base=FOLDER"):
        merge(*parts, tmp_path / "out")
    with pytest.raises(CheckpointError, match="The given model is not the base"):
        merge(*parts, tmp_path / "out", base=tiny_model("llama", seed=1))
    batch = batches(model)[0]
    before = model(**batch).logits
    found = type(model).from_pretrained(merge(*parts, tmp_path / "out", base=model))
    expected = data_party.model.eval()(**batch).logits
    assert torch.allclose(found(**batch).logits, expected, atol=1e-4)
    assert torch.equal(model(**batch).logits, before)


def test_another_base_is_refused(base, tmp_path):
    whole = base()
    data_party, model_party = load(tmp_path, Partition(1, 1))
    inject_adapter_in_model(lora("llama"), data_party.model)
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "other")
    parts = save(tmp_path, data_party, model_party)
    with pytest.raises(CheckpointError, match=r"other is not the base.*weights are files:"):
        merge(*parts, tmp_path / "out", base=tmp_path / "other")
    assert not list(tmp_path.glob("out*"))
    assert whole is not None


def test_adapters_of_different_sorts_are_refused_by_the_option_that_differs(base, tmp_path):
    base()
    data_party, model_party = load(tmp_path, Partition(1, 1))
    inject_adapter_in_model(lora("llama"), data_party.model)
    inject_adapter_in_model(lora("llama", use_rslora=True), model_party.model)
    with pytest.raises(CheckpointError, match="use_rslora is False at one and True at the other"):
        merge(*save(tmp_path, data_party, model_party), tmp_path / "out")


def test_a_run_with_adapters_goes_on_from_its_adapters(base, tmp_path):
    whole = base()

    def start():
        data_party, model_party = load(tmp_path, Partition(1, 1))
        for party in (data_party, model_party):
            inject_adapter_in_model(lora("llama", lora_dropout=0.2), party.model)
        model_party.checkpoints = tmp_path / "theirs"
        return FineTuning(data_party, OPTIONS)

    run = start()
    losses = [run.step(batches(whole)[0])]
    run.save(tmp_path / "ours")
    losses += [run.step(batch) for batch in batches(whole)[1:]]
    torch.manual_seed(99)
    again = start()
    assert again.load(tmp_path / "ours") == 1
    assert [again.step(batch) for batch in batches(whole)[1:]] == losses[1:]
