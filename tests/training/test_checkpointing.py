"""Gradient checkpointing on either side, in both of torch's ways: the whole model's gradients and losses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from vflair_core import Partition, split
from vflair_core.errors import PartitionError
from vflair_core.parties.model_party.party import ModelParty
from vflair_core.partition.slices import Slices
from vflair_core.partition.stages import Stage
from vflair_core.testing import tiny_batch, tiny_model
from vflair_core.training.fine_tuning import FineTuning, Train, train_unsplit

# The name that transformers 5.20 and 5.23 share; the newer one warns that it will go.
pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable.:FutureWarning")
TRAIN = Train(steps=3, learning_rate=0.01, clip=0.3)


def enable(model, *, reentrant):
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})


@pytest.mark.parametrize("partition", [Partition(1, 1), Partition(1, 0)], ids=lambda p: p.kind)
@pytest.mark.parametrize("where", ["data_party", "model_party", "both"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_losses_equal_those_of_the_unsplit_model(kind, reentrant, where, partition):
    whole = tiny_model(kind)
    data_party, model_party = split(copy.deepcopy(whole), partition)
    if data_party.untied:
        whole.lm_head.weight = nn.Parameter(whole.lm_head.weight.detach().clone())
    if where in ("data_party", "both"):
        enable(data_party.model, reentrant=reentrant)
    if where in ("model_party", "both"):
        model_party.gradient_checkpointing_enable({"use_reentrant": reentrant})
    runs = count_runs(data_party.model, model_party.model)
    batches = [tiny_batch(whole, labels="tokens", seed=n) for n in range(3)]
    torch.manual_seed(4)  # gpt2 drops units: what is computed again drops the same ones
    expected = train_unsplit(whole, batches, TRAIN)
    torch.manual_seed(4)
    fine_tuning = FineTuning(data_party, TRAIN)
    assert [fine_tuning.step(batch) for batch in batches] == expected
    again = {"data_party": (2, 1), "model_party": (1, 2), "both": (2, 2)}[where]
    local, remote = runs
    assert local[0] >= 3 * again[0]
    assert remote[0] == 3 * again[1]


def count_runs(*models):
    """How often the first layer norm of the first block of each model ran in training."""
    counts = []
    for model in models:
        norm = next(m for n, m in model.named_modules() if n.endswith(("ln_1", "input_layernorm")))
        count = [0]
        norm.register_forward_hook(
            lambda module, *_, count=count: count.__setitem__(0, count[0] + module.training)
        )
        counts.append(count)
    return counts


def test_what_is_computed_again_is_computed_in_the_mode_of_its_forward():
    whole = tiny_model("gpt2")
    data_party, model_party = split(copy.deepcopy(whole), Partition(1, 1))
    model_party.gradient_checkpointing_enable()
    batch = tiny_batch(whole, labels="tokens")
    gradients = []
    for model in (whole, data_party.model):
        torch.manual_seed(4)
        model.train()
        loss = model(**batch, use_cache=False).loss
        if model is data_party.model:
            model.eval()
            with torch.no_grad():
                model(**batch, use_cache=False)
        loss.backward()
    gradients = [dict(m.named_parameters()) for m in (whole, model_party)]
    for name, weight in gradients[1].items():
        assert torch.equal(weight.grad, gradients[0][name].grad), name


def test_it_can_be_switched_off_again():
    _, model_party = split(tiny_model("llama"), Partition(1, 1))
    model_party.gradient_checkpointing_enable()
    model_party.gradient_checkpointing_disable()
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model_party.model.modules())


def test_a_model_party_without_blocks_says_so():
    model = nn.Module()
    model.add_module("lm_head", nn.Linear(2, 2))
    with pytest.raises(PartitionError, match="none is a block"):
        ModelParty(model, [Stage((), ("lm_head",))], "", Slices({})).gradient_checkpointing_enable()
