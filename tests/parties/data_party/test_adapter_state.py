"""Adapters are on or off at both parties at once: the unsplit model with all of them is the witness."""

from __future__ import annotations

import copy
import itertools

import peft
import pytest
import torch
from peft.helpers import rescale_adapter_scale

from vflair_core import Lora, Partition, split, tune
from vflair_core.errors import PartitionError, ProtocolError
from vflair_core.parties.divide import divide
from vflair_core.testing import tiny_batch, tiny_model

CUTS = [Partition(1, 1), Partition(1, 0)]
KINDS = ["gpt2", "llama", "bert"]
LAYERS = {
    "gpt2": ["c_attn"],
    "llama": ["q_proj", "up_proj"],
    "bert": ["query", "intermediate.dense"],
}
TASKS = {"bert": "classification"}

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning",
    "ignore:fan_in_fan_out is set to:UserWarning",
    "ignore:Input and output embeddings are no longer tied:UserWarning",
)


class Pair:
    """A whole model and a split one, each with the same adapters, of random weights."""

    def __init__(self, kind, partition, names=("default",), method=None, **options):
        task = TASKS.get(kind, "causal-lm")
        self.whole = tiny_model(kind, task)
        self.data_party, self.model_party = split(
            copy.deepcopy(self.whole), partition, wire=True, **options
        )
        self.batch = tiny_batch(self.whole)
        method = method or (lambda: peft.LoraConfig(r=2, target_modules=LAYERS[kind]))
        owners = (self.whole, self.data_party.model, self.model_party.model)
        first, *others = names
        models = [self._wrapped(model, method(), first) for model in owners]
        self.peft_whole, self.peft_data, self.peft_held = models
        for name in others:
            for model in models:
                model.add_adapter(name, method())
        self._same_weights()

    @staticmethod
    def _wrapped(model, config, name):
        if not hasattr(model, "prepare_inputs_for_generation"):
            config.task_type = None
        return peft.get_peft_model(model, config, adapter_name=name)

    def _same_weights(self):
        whole = dict(self.whole.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for number, (name, weight) in enumerate(whole.items()):
                if ".lora_" in name or "hada_" in name or "ia3_" in name:
                    generator = torch.Generator().manual_seed(number)
                    weight.copy_(torch.randn(weight.shape, generator=generator))
            for owner in (self.data_party, self.model_party):
                for name, weight in owner.named_parameters():
                    weight.copy_(whole[name])

    def logits(self):
        with torch.no_grad():
            return (
                self.peft_whole(**self.batch).logits,
                self.peft_data(**self.batch).logits,
            )

    def is_equal(self):
        expected, found = self.logits()
        return torch.equal(expected, found)


@pytest.fixture(params=itertools.product(KINDS, CUTS), ids=lambda p: f"{p[0]}-{p[1].kind}")
def pair(request):
    return Pair(*request.param)


def test_adapters_that_are_switched_off_are_off_at_both(pair):
    on = pair.logits()
    assert torch.equal(*on)
    with pair.peft_whole.disable_adapter(), pair.peft_data.disable_adapter():
        off = pair.logits()
        assert torch.equal(*off)
    assert not torch.allclose(off[0], on[0], atol=1e-3)
    again = pair.logits()
    assert torch.equal(again[1], on[0])


def test_what_is_trained_at_the_model_party_stays_as_it_was(pair):
    before = {n: p.requires_grad for n, p in pair.model_party.named_parameters()}
    assert any(before.values())
    with pair.peft_data.disable_adapter():
        pair.logits()
    assert {n: p.requires_grad for n, p in pair.model_party.named_parameters()} == before


def test_the_own_way_to_switch_them_off_does_so_where_the_data_party_has_none():
    whole = tiny_model("llama")
    data_party, model_party = split(copy.deepcopy(whole), Partition(1, 1))
    tune(model_party, ["body"], adapters=Lora(r=2))
    with torch.no_grad():
        for name, weight in model_party.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.5)
        batch = tiny_batch(whole)
        expected = whole(**batch).logits
        assert not torch.allclose(data_party.model(**batch).logits, expected, atol=1e-3)
        with data_party.without_adapters():
            assert torch.equal(data_party.model(**batch).logits, expected)
        assert not torch.allclose(data_party.model(**batch).logits, expected, atol=1e-3)


@pytest.mark.parametrize("partition", CUTS, ids=lambda partition: partition.kind)
def test_the_active_adapter_is_the_same_at_both(partition):
    pair = Pair("llama", partition, names=("default", "second"))
    seen = []
    for active in ("second", "default"):
        pair.peft_whole.set_adapter(active)
        pair.peft_data.set_adapter(active)  # and nobody tells the model party
        expected, found = pair.logits()
        assert torch.equal(expected, found)
        seen.append(found)
    assert not torch.allclose(*seen, atol=1e-3)
    for model in (pair.peft_whole, pair.peft_data):
        model.base_model.set_adapter(["default", "second"])
    assert pair.is_equal()


@pytest.mark.parametrize("partition", CUTS, ids=lambda partition: partition.kind)
def test_generation_follows_the_state_of_adapters(partition):
    pair = Pair("llama", partition)
    prompt = {"input_ids": pair.batch["input_ids"][:1, :4]}
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": 2}
    with pair.peft_whole.disable_adapter(), pair.peft_data.disable_adapter():
        expected = pair.peft_whole.generate(**prompt, **options)
        assert torch.equal(pair.peft_data.generate(**prompt, **options), expected)


def test_gradients_are_those_of_the_state_of_the_forward_also_when_it_is_computed_again():
    pair = Pair("llama", Partition(1, 1), names=("default", "second"))
    pair.model_party.gradient_checkpointing_enable()
    for model in (pair.peft_whole, pair.peft_data):
        model.set_adapter("second")
    pair.peft_held.set_adapter("second")  # so that its weights are trained; then as it was
    for layer in pair.model_party.model.modules():
        if isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer):
            vars(layer)["_active_adapter"] = ["default"]
    batch = tiny_batch(pair.whole, labels="tokens")
    for model in (pair.peft_whole, pair.peft_data):
        model.train()
        model(**batch, use_cache=False).loss.backward()
    whole = dict(pair.whole.named_parameters())
    for name, weight in pair.model_party.named_parameters():
        if weight.requires_grad:
            assert torch.allclose(weight.grad, whole[name].grad, atol=1e-6), name
            assert "second" in name


def test_a_merged_half_is_the_same_model(pair):
    expected, _ = pair.logits()
    pair.peft_data.merge_adapter()
    assert torch.allclose(pair.logits()[1], expected, atol=1e-3)
    with pair.peft_whole.disable_adapter(), pair.peft_data.disable_adapter():
        expected_off, found = pair.logits()
        assert torch.allclose(found, expected_off, atol=1e-3)


def test_adapters_that_are_unloaded_are_off_at_both(pair):
    plain = tiny_model(
        pair.whole.config.model_type, TASKS.get(pair.whole.config.model_type, "causal-lm")
    )
    pair.logits()
    pair.peft_data.unload()
    with torch.no_grad():
        expected = plain(**pair.batch).logits
        assert torch.allclose(pair.data_party.model(**pair.batch).logits, expected, atol=1e-6)


def test_adapters_that_are_merged_and_unloaded_stay_on_at_both(pair):
    expected, _ = pair.logits()
    pair.peft_data.merge_and_unload()
    with torch.no_grad():
        found = pair.data_party.model(**pair.batch).logits
    assert torch.allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize("partition", CUTS, ids=lambda partition: partition.kind)
def test_a_scale_of_the_adapters_holds_at_both(partition):
    pair = Pair("llama", partition)
    plain = pair.logits()[0]
    with rescale_adapter_scale(pair.peft_whole, 0.25), rescale_adapter_scale(pair.peft_data, 0.25):
        expected, found = pair.logits()
        assert torch.allclose(found, expected, atol=1e-6)
        assert not torch.allclose(expected, plain, atol=1e-3)
    assert pair.is_equal()


def loha():
    return peft.LoHaConfig(r=2, target_modules=["q_proj", "up_proj"])


def ia3():
    return peft.IA3Config(target_modules=["q_proj", "up_proj"], feedforward_modules=["up_proj"])


def rslora():
    return peft.LoraConfig(r=4, use_rslora=True, use_dora=True, target_modules=["q_proj"])


@pytest.mark.parametrize("method", [loha, ia3, rslora])
def test_other_methods_of_peft_are_switched_too(method):
    pair = Pair("llama", Partition(1, 1), method=method)
    assert pair.is_equal()
    with pair.peft_whole.disable_adapter(), pair.peft_data.disable_adapter():
        assert pair.is_equal()
    assert pair.is_equal()


def test_a_chain_of_model_parties_follows():
    pair = Pair("llama", Partition(1, 1))
    divide(pair.model_party, 1)
    with pair.peft_whole.disable_adapter(), pair.peft_data.disable_adapter():
        assert pair.is_equal()
    assert pair.is_equal()


def test_names_that_the_model_party_does_not_have_are_refused():
    _, data_party, model_party = None, *split(tiny_model("llama"), Partition(1, 1))
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    model = peft.get_peft_model(data_party.model, config, adapter_name="mine")
    tune(model_party, adapters=Lora(r=2))
    with pytest.raises(ProtocolError, match="adapters are mine; the model party has default"):
        model(**tiny_batch(data_party.model))


def test_layers_in_different_states_are_refused():
    pair = Pair("llama", Partition(1, 1))
    layer = next(m for m in pair.peft_data.modules() if hasattr(m, "lora_A"))
    layer.enable_adapters(enabled=False)
    with pytest.raises(PartitionError, match="default on; off"):
        pair.peft_data(**pair.batch)


def test_adapters_of_their_own_for_rows_are_refused():
    pair = Pair("llama", Partition(1, 1), names=("default", "second"))
    pair.peft_data.eval()
    names = ["default", "second", "__base__"][: len(pair.batch["input_ids"])]
    names += ["default"] * (len(pair.batch["input_ids"]) - len(names))
    with pytest.raises(PartitionError, match="Call the model once for each adapter"):
        pair.peft_data(**pair.batch, adapter_names=names)


def scaled_then_merged(model):
    for layer in model.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            layer.scale_layer(2.0)
            layer.merge()


def test_a_scale_that_was_merged_holds_at_both(pair):
    plain = pair.logits()[0]
    for model in (pair.peft_whole, pair.peft_data):
        scaled_then_merged(model)
    expected, found = pair.logits()
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(expected, plain, atol=1e-2)


def test_adapters_that_are_unloaded_before_the_first_call_are_off_at_both():
    pair = Pair("llama", Partition(1, 1))
    plain = tiny_model("llama")
    pair.peft_data.unload()
    with torch.no_grad():
        expected = plain(**pair.batch).logits
        assert torch.equal(pair.data_party.model(**pair.batch).logits, expected)


def adalora():
    return peft.AdaLoraConfig(total_step=10, target_modules=["q_proj"])


def test_a_method_that_scales_in_its_forward_is_not_scaled_again():
    pair = Pair("llama", Partition(1, 1), method=adalora)
    with torch.no_grad():
        for name, weight in pair.whole.named_parameters():
            if ".lora_E" in name:
                weight.normal_()
        whole = dict(pair.whole.named_parameters())
        for party in (pair.data_party, pair.model_party):
            for name, weight in party.named_parameters():
                weight.copy_(whole[name])
    assert pair.is_equal()
    with rescale_adapter_scale(pair.peft_whole, 0.5), rescale_adapter_scale(pair.peft_data, 0.5):
        assert torch.allclose(*pair.logits(), atol=1e-6)


def test_an_adapter_that_begins_at_certain_tokens_is_refused():
    data_party, _ = split(tiny_model("llama"), Partition(1, 1))
    config = peft.LoraConfig(
        target_modules=["q_proj"], alora_invocation_tokens=[5], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(data_party.model, config)
    with pytest.raises(PartitionError, match="activated LoRA"):
        model(**tiny_batch(data_party.model))
