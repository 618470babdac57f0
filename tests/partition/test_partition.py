"""A cut model computes, bit for bit, what the whole one computes, and each weight has one owner."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2Model

from vflair_core.errors import PartitionError
from vflair_core.parties.split import locate_blocks, split
from vflair_core.partition.partition import Partition
from vflair_core.testing import tiny_batch, tiny_model

MODELS = [
    ("gpt2", "causal-lm"),
    ("llama", "causal-lm"),
    ("qwen2", "causal-lm"),
    ("gpt2", "classification"),
    ("bert", "classification"),
    ("roberta", "classification"),
]
CUTS = [(1, 1), (0, 1), (1, 2), (0, 0), (3, 0)]


def labelled(model, task, padding=None):
    labels = "tokens" if task == "causal-lm" else "classes"
    return tiny_batch(model, padding=padding, labels=labels)


def gradients_of(*owners):
    return {
        name: p.grad
        for owner in owners
        for name, p in owner.named_parameters()
        if p.grad is not None
    }


def assert_gradients_agree(found, expected, tolerance=1e-6):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        furthest = (found[name] - gradient).abs().max()
        assert furthest <= tolerance * gradient.abs().max(), name


@pytest.mark.parametrize("wire", [False, True], ids=["clones", "wire"])
@pytest.mark.parametrize(("head", "tail"), CUTS)
@pytest.mark.parametrize(("kind", "task"), MODELS)
def test_split_model_equals_whole_model_bit_for_bit(cut, kind, task, head, tail, wire):
    parties = cut(kind, head, tail, task=task, wire=wire)
    for padding in (None, "left", "right"):
        batch = labelled(parties.whole, task, padding)
        with torch.no_grad():
            whole, ours = parties.whole(**batch), parties.data_party.model(**batch)
        assert torch.equal(ours.logits, whole.logits)
        assert torch.equal(ours.loss, whole.loss)


@pytest.mark.parametrize("wire", [False, True], ids=["clones", "wire"])
@pytest.mark.parametrize(("head", "tail"), [(1, 1), (0, 2), (2, 0), (0, 0)])
@pytest.mark.parametrize(("kind", "task"), MODELS)
def test_gradients_of_both_parties_equal_those_of_the_whole_model(
    cut, kind, task, head, tail, wire
):
    parties = cut(kind, head, tail, task=task, wire=wire)
    batch = labelled(parties.whole, task, "right")
    parties.whole(**batch).loss.backward()
    parties.data_party.model(**batch).loss.backward()
    expected = gradients_of(parties.whole)
    for (
        copied
    ) in parties.data_party.untied:  # one weight there, two here: their gradients add up to it
        twin = "transformer.wte.weight"
        theirs = dict(parties.model_party.named_parameters())[copied].grad
        ours = dict(parties.data_party.named_parameters())[twin].grad
        total = expected.pop(twin)
        assert (ours + theirs - total).abs().max() <= 1e-6 * total.abs().max()
        dict(parties.data_party.named_parameters())[twin].grad = None
        dict(parties.model_party.named_parameters())[copied].grad = None
    assert_gradients_agree(gradients_of(parties.data_party, parties.model_party), expected)


@pytest.mark.parametrize(("head", "tail"), [(1, 1), (1, 0)])
@pytest.mark.parametrize(("kind", "task"), [("gpt2", "causal-lm"), ("bert", "classification")])
def test_training_mode_draws_the_dropout_of_the_whole_model(cut, kind, task, head, tail):
    parties = cut(kind, head, tail, task=task)
    batch = labelled(parties.whole, task)
    evaluated = parties.whole(**batch).logits
    parties.whole.train()
    parties.data_party.model.train()
    torch.manual_seed(5)
    expected = parties.whole(**batch)
    torch.manual_seed(5)
    ours = parties.data_party.model(**batch)
    assert not torch.equal(expected.logits, evaluated)
    assert torch.equal(ours.logits, expected.logits)
    parties.data_party.model.eval()
    assert torch.equal(parties.data_party.model(**batch).logits, evaluated)


def test_gradient_free_forward_in_inference_mode_equals_the_whole_model(cut):
    parties = cut()
    batch = labelled(parties.whole, "causal-lm")
    expected = parties.whole(**batch).logits
    with torch.inference_mode():
        ours = parties.data_party.model(**batch)
    assert torch.equal(ours.logits, expected)


@pytest.mark.parametrize(("kind", "tail"), [("gpt2", 1), ("llama", 1), ("llama", 0)])
def test_three_steps_of_one_optimizer_over_both_parties_give_the_losses_of_the_whole_model(
    cut, kind, tail
):
    parties = cut(kind, 1, tail)
    batch = labelled(parties.whole, "causal-lm", "right")

    def losses(model, parameters):
        optimizer = torch.optim.SGD(parameters, lr=0.05)
        found = []
        for _ in range(3):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    both = [*parties.data_party.parameters(), *parties.model_party.parameters()]
    expected = losses(parties.whole, parties.whole.parameters())
    assert losses(parties.data_party.model, both) == pytest.approx(expected, rel=1e-6)
    assert expected[2] < expected[0]


@pytest.mark.parametrize(("head", "tail"), CUTS)
@pytest.mark.parametrize(("kind", "task"), MODELS)
def test_the_parties_names_are_disjoint_and_together_the_whole_model(cut, kind, task, head, tail):
    parties = cut(kind, head, tail, task=task)
    ours, theirs = (
        dict(parties.data_party.named_parameters()),
        dict(parties.model_party.named_parameters()),
    )
    expected = dict(parties.whole.named_parameters())
    assert not ours.keys() & theirs.keys()
    assert not {id(p) for p in ours.values()} & {id(p) for p in theirs.values()}
    assert not {p.data_ptr() for p in ours.values()} & {p.data_ptr() for p in theirs.values()}
    assert (ours.keys() | theirs.keys()) - set(parties.data_party.untied) == expected.keys()
    for name, weight in expected.items():
        assert torch.equal((ours | theirs)[name], weight)


def test_tied_head_is_untied_and_named_when_the_model_party_takes_it(cut):
    parties = cut("gpt2", 1, 0)
    assert parties.data_party.untied == ("lm_head.weight",)
    copied = dict(parties.model_party.named_parameters())["lm_head.weight"]
    original = dict(parties.data_party.named_parameters())["transformer.wte.weight"]
    assert torch.equal(copied, original)
    assert copied.data_ptr() != original.data_ptr()


@pytest.mark.parametrize(("kind", "tail"), [("gpt2", 1), ("llama", 0)])
def test_nothing_is_untied_where_nothing_is_shared(cut, kind, tail):
    assert cut(kind, 1, tail).data_party.untied == ()


def test_the_cut_leaves_training_flags_as_they_were():
    model = tiny_model("gpt2").train()
    model.transformer.h[1].eval()  # frozen by its owner, say
    expected = {name: module.training for name, module in model.named_modules()}
    data_party, model_party = split(model, Partition(head=1, tail=0))
    found = dict(data_party.model.named_modules()) | dict(model_party.model.named_modules())
    held = {name for name in expected if name.startswith(data_party.absent)}
    assert {name: found[name].training for name in held} == {name: expected[name] for name in held}


@pytest.mark.parametrize(("head", "tail"), [(2, 2), (4, 0), (0, 4), (9, 9)])
def test_a_cut_that_leaves_the_model_party_nothing_names_the_legal_range(head, tail):
    with pytest.raises(PartitionError, match=rf"{head} \+ {tail} of 4 blocks.*between 0 and 3"):
        split(tiny_model("gpt2"), Partition(head=head, tail=tail))


@pytest.mark.parametrize("value", [-1, True, 1.5, "2", None])
@pytest.mark.parametrize("side", ["head", "tail"])
def test_a_partition_takes_whole_numbers_only(side, value):
    with pytest.raises(PartitionError, match=f"{side} must be a whole number of blocks >= 0"):
        Partition(**{side: value})


def test_a_model_without_blocks_names_the_hook_that_can_help():
    with pytest.raises(
        PartitionError, match=r"Linear lie: found no list of blocks.*vflair_locate_blocks"
    ):
        locate_blocks(nn.Linear(2, 2))


def test_a_model_with_two_lists_of_blocks_names_both():
    config = GPT2Config(vocab_size=64, n_positions=8, n_embd=16, n_layer=2, n_head=2)
    two = nn.ModuleDict({"left": GPT2Model(config), "right": GPT2Model(config)})
    with pytest.raises(PartitionError, match=r"found left\.h, right\.h"):
        locate_blocks(two)


def test_a_refused_cut_leaves_the_model_whole(tiny_model, batch):
    expected = copy.deepcopy(tiny_model)(**batch).logits
    with pytest.raises(PartitionError):
        split(tiny_model, Partition(head=4, tail=4))
    assert torch.equal(tiny_model(**batch).logits, expected)


# peft 0.21 asks transformers 5.23 by a name that transformers deprecates.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_lora_on_all_linear_layers_touches_only_local_ones_and_learns(cut, kind):
    parties = cut(kind)
    before = {name: p.clone() for name, p in parties.model_party.named_parameters()}
    config = LoraConfig(
        target_modules="all-linear", task_type="CAUSAL_LM", r=4, init_lora_weights=True
    )
    if kind == "gpt2":
        config.fan_in_fan_out = True
    model = get_peft_model(parties.data_party.model, config)
    batch = labelled(parties.whole, "causal-lm", "right")
    assert torch.equal(model(**batch).logits, parties.whole(**batch).logits)  # LoRA starts at zero

    adapted = [name for name, p in model.named_parameters() if p.requires_grad]
    blocks = {name.partition(".lora_")[0].rpartition("base_model.model.")[2] for name in adapted}
    assert blocks
    assert not [name for name in blocks if name.startswith(parties.data_party.absent)]

    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(8):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    after = dict(parties.model_party.named_parameters())
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_half_a_model_is_not_saved_as_a_whole_one(cut, tmp_path):
    with pytest.raises(PartitionError, match="holds half of the weights"):
        cut("llama").data_party.model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
