"""What is trained is what was chosen, and with adapters too a split run takes the unsplit run's steps."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from vflair_core import Partition, split
from vflair_core.errors import ExperimentError
from vflair_core.partition.adapters import plain_state
from vflair_core.testing import tiny_batch, tiny_model
from vflair_core.training.fine_tuning import FineTuning, Train, train_unsplit
from vflair_core.training.tuning import Lora, tune

SHAPES = [("gpt2", "causal-lm"), ("llama", "causal-lm"), ("bert", "classification")]
CUTS = [Partition(1, 1), Partition(1, 0)]


@pytest.fixture(params=SHAPES, ids=lambda shape: shape[0])
def shape(request):
    return request.param


@pytest.fixture(params=CUTS, ids=lambda partition: partition.kind)
def parties(request, shape, cut):
    kind, task = shape
    found = cut(kind, request.param.head, request.param.tail, task=task, wire=True)
    if found.data_party.untied:  # the output layer got a copy of its own, so the witness gets one
        weight = found.whole.lm_head.weight.detach().clone()
        found.whole.lm_head.weight = nn.Parameter(weight)
    labels = "classes" if task == "classification" else "tokens"
    found.batches = [
        tiny_batch(found.whole, padding="right", labels=labels, seed=n) for n in range(4)
    ]
    return found


def both(parties, **options):
    """Names of what is trained at either party."""
    return [
        name
        for owner in (parties.data_party, parties.model_party)
        for name in tune(owner, **options)
    ]


def trained_as_the_whole_model(parties, train):
    """Train split and unsplit; return both lists of losses."""
    torch.manual_seed(4)
    expected = train_unsplit(parties.whole, parties.batches, train)
    torch.manual_seed(4)
    fine_tuning = FineTuning(parties.data_party, train)
    return [fine_tuning.step(batch) for batch in parties.batches], expected


def weights_of(parties):
    owners = (parties.data_party, parties.model_party)
    return {name: weight for owner in owners for name, weight in owner.named_parameters()}


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_four_clipped_lora_steps_equal_those_of_peft_on_the_whole_model(parties, dropout):
    lora = Lora(r=4, alpha=8, dropout=dropout)
    names = both(parties, adapters=lora, seed=3)
    # The witness is made by peft alone, with the adapters' first weights copied by name.
    blocks = {n.rpartition(".lora_")[0] for n in names}
    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=blocks)
    config.fan_in_fan_out = "attn.c_attn" in " ".join(blocks)
    peft.inject_adapter_in_model(config, parties.whole)
    whole, ours = dict(parties.whole.named_parameters()), weights_of(parties)
    assert sorted(names) == sorted(n for n, p in whole.items() if p.requires_grad)
    with torch.no_grad():
        for name in names:
            whole[name].copy_(ours[name])
    losses, expected = trained_as_the_whole_model(
        parties, Train(steps=4, learning_rate=0.05, clip=0.05)
    )
    assert losses == expected
    assert len(set(losses)) == 4
    for name, weight in weights_of(parties).items():
        assert torch.equal(weight, whole[name]), name


def test_an_adapter_of_the_task_head_is_used_by_a_model_party_that_holds_it(cut):
    parties = cut("llama", 1, 0)
    tune(parties.data_party, ["model_party"], adapters=Lora(r=2))
    lora = Lora(r=2, target_modules=["lm_head"])
    names = tune(parties.model_party, ["model_party"], adapters=lora)
    assert names == ["lm_head.lora_A.default.weight", "lm_head.lora_B.default.weight"]
    batch = tiny_batch(parties.whole, labels="tokens")
    with torch.no_grad():
        dict(parties.model_party.named_parameters())[names[1]].fill_(0.5)
    base, low = parties.whole.lm_head, parties.model_party.model.lm_head.lora_A.default.weight
    added = 16 / 2 * torch.full((64, 2), 0.5) @ low  # alpha / r · B · A
    base.weight.data += added.detach()
    expected = parties.whole(**batch)
    out = parties.data_party.model(**batch)
    assert torch.allclose(out.logits, expected.logits, atol=1e-4)
    out.loss.backward()
    assert low.grad.abs().sum() > 0


def test_adapters_start_equal_in_a_whole_model_and_in_its_halves(parties):
    lora = Lora(r=3)
    names = both(parties, adapters=lora, seed=7)
    whole = tune(parties.whole, adapters=lora, seed=7, slices=parties.data_party.slices)
    assert sorted(names) == sorted(whole)
    ours, theirs = weights_of(parties), dict(parties.whole.named_parameters())
    assert all(torch.equal(ours[name], theirs[name]) for name in names)
    first, second, *_ = (ours[n] for n in names if "lora_A" in n and ours[n].shape[1] == 16)
    assert not torch.equal(first, second)


def test_another_seed_gives_other_adapters_and_the_global_stream_is_left_alone(cut):
    drawn = []
    for seed in (1, 2):
        parties = cut("llama")
        torch.manual_seed(0)
        names = tune(parties.model_party, adapters=Lora(r=2), seed=seed)
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(0)))
        drawn.append(dict(parties.model_party.named_parameters())[names[0]])
    assert not torch.equal(*drawn)


@pytest.mark.parametrize(
    "config",
    [
        peft.LoHaConfig(r=2, target_modules=["q_proj", "down_proj"]),
        peft.IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        peft.LoraConfig(r=2, use_dora=True, use_rslora=True, target_modules=r".*\.(q|v)_proj"),
    ],
    ids=["loha", "ia3", "dora"],
)
def test_any_method_of_peft_that_puts_modules_into_layers_equals_the_whole_model(cut, config):
    parties = cut("llama", wire=True)
    names = both(parties, adapters=config)
    assert sorted(names) == sorted(
        tune(parties.whole, adapters=config, slices=parties.data_party.slices)
    )
    parties.batches = [tiny_batch(parties.whole, labels="tokens", seed=n) for n in range(4)]
    losses, expected = trained_as_the_whole_model(parties, Train(steps=4, learning_rate=0.05))
    assert losses == expected
    assert len(set(losses)) == 4


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_peft_may_be_called_on_both_models_by_hand(parties):
    names = [n for n, m in parties.whole.named_modules() if isinstance(m, nn.Linear) and "." in n]
    names = names or [n for n, _ in parties.whole.named_modules() if n.endswith("c_attn")]
    names = [name for name in names if any(c.isdigit() for c in name)]
    transposed = "c_attn" in " ".join(names)
    for model in (parties.whole, parties.data_party.model, parties.model_party.model):
        here = [name for name in names if _holds(model, name)]
        peft.get_peft_model(
            model, peft.LoraConfig(r=2, target_modules=here, fan_in_fan_out=transposed)
        )
    whole, ours = dict(parties.whole.named_parameters()), weights_of(parties)
    assert whole.keys() == ours.keys()
    with torch.no_grad():
        for name, weight in whole.items():
            weight.copy_(ours[name])
    losses, expected = trained_as_the_whole_model(parties, Train(steps=4, learning_rate=0.05))
    assert losses == expected


def _holds(model, name):
    try:
        return isinstance(model.get_submodule(name), nn.Module) and any(
            True for _ in model.get_submodule(name).parameters()
        )
    except AttributeError:
        return False


# -- slices ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trainable", "partition", "units"),
    [
        (["head"], (1, 1), {"model.embed_tokens", "model.layers.0"}),
        (["body"], (1, 1), {"model.layers.1", "model.layers.2"}),
        (["tail"], (1, 1), {"model.layers.3", "model.norm", "lm_head"}),
        (["tail"], (3, 0), {"model.layers.3", "model.norm", "lm_head"}),
        (["embeddings", "blocks.2"], (1, 1), {"model.embed_tokens", "model.layers.2"}),
        (["task_head"], (1, 1), {"model.norm", "lm_head"}),
        (["data_party"], (2, 0), {"model.embed_tokens", "model.layers.0", "model.layers.1"}),
        ([], (1, 1), set()),
    ],
    ids=lambda value: str(value) if isinstance(value, tuple | list) else "",
)
def test_a_slice_is_the_part_of_the_model_that_it_names(cut, trainable, partition, units):
    parties = cut("llama", *partition)
    names = both(parties, trainable=trainable)
    assert names == [n for n, p in weights_of(parties).items() if p.requires_grad]
    expected = {n for n in weights_of(parties) if n.startswith(tuple(f"{u}." for u in units))}
    assert set(names) == expected


def test_slices_and_adapters_reach_both_stacks_of_a_sequence_to_sequence_model(cut):
    config = AutoConfig.for_model(
        "t5", vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0,
    )  # fmt: skip
    parties = cut(model=AutoModelForSeq2SeqLM.from_config(config).eval())
    units = {name.partition("SelfAttention")[0] for name in both(parties, trainable=["body"])}
    assert {unit[:15] for unit in units if "block" in unit} == {
        "encoder.block.1",
        "decoder.block.1",
    }
    names = both(parties, adapters=Lora(r=2))
    whole = tune(parties.whole, adapters=Lora(r=2), slices=parties.data_party.slices)
    assert sorted(names) == sorted(whole)
    parties.batches = [
        {
            key: torch.randint(3, 64, (2, length))
            for key, length in (("input_ids", 5), ("labels", 4))
        }
        for _ in range(4)
    ]
    train = Train(steps=4, learning_rate=0.05, clip=0.1)
    losses, expected = trained_as_the_whole_model(parties, train)
    assert losses == pytest.approx(
        expected, abs=2e-6
    )  # the encoder's gradients are summed in another order


def test_a_tied_weight_is_trained_if_either_of_its_slices_is(cut):
    parties = cut("gpt2", 1, 1)
    assert "transformer.wte.weight" in tune(parties.data_party, ["task_head"])
    assert "transformer.wte.weight" in tune(parties.data_party, ["embeddings"])
    assert "transformer.wte.weight" not in tune(parties.data_party, ["blocks.0"])


@pytest.mark.parametrize("trainable", [["data_party"], ["body"], ["head", "task_head"]])
def test_training_some_slices_equals_the_whole_model_with_the_rest_frozen(parties, trainable):
    if "body" in trainable and parties.data_party.partition.kind == "HT":
        trainable = ["tail"]
    names = both(parties, trainable=trainable)
    for name, weight in parties.whole.named_parameters():
        weight.requires_grad_(name in names)
    before = {n: w.clone() for n, w in weights_of(parties).items()}
    losses, expected = trained_as_the_whole_model(
        parties, Train(steps=4, learning_rate=0.01, clip=0.1)
    )
    assert losses == expected
    after = weights_of(parties)
    assert all(torch.equal(before[n], after[n]) for n in after if n not in names)


def test_a_full_slice_at_the_model_party_gets_no_adapters(cut):
    parties = cut("llama", 1, 0)
    lora = Lora(r=2, target_modules=["q_proj", "lm_head"], full=["task_head"])
    names = tune(parties.model_party, ["model_party"], adapters=lora)
    own = {name for name in names if "lora_" not in name}
    assert own == {"model.norm.weight", "lm_head.weight"}


def test_full_slices_are_trained_themselves_beside_the_adapters(cut):
    parties = cut("bert", 1, 1, task="classification")
    names = both(parties, trainable=["model_party"], adapters=Lora(r=2, full=["task_head"]))
    own = {name.partition(".")[0] for name in names if "lora_" not in name}
    assert own == {"bert", "classifier"}  # bert.pooler and the classifier
    assert all("layer.0" not in name and "layer.3" not in name for name in names)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"trainable": ["body"]}, r"has no slice 'body'.*embeddings, head, model_party, tail"),
        ({"trainable": ["blocks.9"]}, r"no slice 'blocks.9'. Did you mean 'blocks"),
        (
            {"adapters": Lora(r=2, target_modules=["q_porj"])},
            r"goes by 'q_porj'. Did you mean 'q_proj'",
        ),
        ({"adapters": peft.PromptTuningConfig(num_virtual_tokens=2)}, "peft.get_peft_model"),
        (
            {"adapters": peft.LoraConfig(modules_to_save=["lm_head"])},
            r"full=\['task_head'\].* instead of modules_to_save",
        ),
        ({"adapters": peft.VeraConfig(target_modules=["q_proj"])}, "shares weights between layers"),
    ],
    ids=["body in HT", "block", "layer", "prompt", "modules_to_save", "vera"],
)
def test_a_choice_that_does_not_fit_is_refused_by_name(cut, options, words):
    with pytest.raises(ExperimentError, match=words):
        tune(cut("llama", 1, 0).data_party, **options)


def test_a_whole_model_needs_to_be_told_how_it_is_cut():
    with pytest.raises(ExperimentError, match=r"slices=data_party\.slices"):
        tune(tiny_model("llama"))


def test_merged_weights_are_those_of_the_model_without_its_adapters(cut):
    parties = cut("gpt2")
    both(parties, adapters=Lora(r=2))
    for name, weight in weights_of(parties).items():
        if "lora_B" in name:
            nn.init.normal_(weight)
    batch = tiny_batch(parties.whole)
    expected = parties.data_party.model(**batch).logits
    before = copy.deepcopy(parties.whole)
    merged = plain_state(parties.data_party.model) | plain_state(parties.model_party.model)
    assert merged.keys() == parties.whole.state_dict().keys()
    parties.whole.load_state_dict(merged)
    assert torch.allclose(parties.whole(**batch).logits, expected, atol=1e-4)
    assert not torch.allclose(before(**batch).logits, expected, atol=1e-2)


def test_splitting_a_model_that_has_adapters_keeps_them():
    whole = tiny_model("llama")
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), whole)
    data_party, model_party = split(copy.deepcopy(whole), Partition(1, 1))
    train = Train(steps=3, learning_rate=0.05, clip=0.1)
    batches = [tiny_batch(whole, labels="tokens", seed=n) for n in range(3)]
    expected = train_unsplit(whole, batches, train)
    fine_tuning = FineTuning(data_party, train)
    assert [fine_tuning.step(batch) for batch in batches] == expected
    assert any("lora_A" in name for name, _ in model_party.named_parameters())
