"""Steps in two phases: the very steps of the textbook loop on the unsplit model, or none at all."""

from __future__ import annotations

import copy

import pytest
import torch

from vflair_core import Partition, split
from vflair_core.errors import ProtocolError
from vflair_core.testing import tiny_batch, tiny_model
from vflair_core.training.fine_tuning import FineTuning, Train, train_unsplit


@pytest.fixture
def parties(cut):
    found = cut("llama", wire=True)
    found.batch = tiny_batch(found.whole, labels="tokens")
    return found


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize(
    "options",
    [
        {"clip": 0.3, "schedule": "cosine", "warmup": 2},
        {"clip": 0.0, "schedule": "linear", "weight_decay": 0.1},
        {"clip": 1e9, "schedule": "constant"},
    ],
    ids=["clipped", "unclipped", "constant"],
)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_losses_equal_the_unsplit_models_bit_for_bit(kind, optimizer, options):
    whole = tiny_model(kind)
    party, _ = split(copy.deepcopy(whole), Partition(1, 1))
    train = Train(steps=6, optimizer=optimizer, learning_rate=0.01, **options)
    batches = [tiny_batch(whole, padding="right", labels="tokens", seed=n) for n in range(6)]
    torch.manual_seed(4)
    expected = train_unsplit(whole, batches, train)
    torch.manual_seed(4)
    fine_tuning = FineTuning(party, train)
    assert [fine_tuning.step(batch) for batch in batches] == expected
    assert len(set(expected)) == 6


def test_classification_losses_equal_the_unsplit_models_in_ht():
    whole = tiny_model("bert", task="classification")
    party, _ = split(copy.deepcopy(whole), Partition(1, 0))
    train = Train(steps=5, learning_rate=0.01, clip=0.5)
    batches = [tiny_batch(whole, padding="right", labels="classes", seed=n) for n in range(5)]
    torch.manual_seed(4)
    expected = train_unsplit(whole, batches, train)
    torch.manual_seed(4)
    fine_tuning = FineTuning(party, train)
    assert [fine_tuning.step(batch) for batch in batches] == expected


def test_accumulated_batches_make_one_step_of_their_mean():
    whole = tiny_model("llama")
    party, _ = split(copy.deepcopy(whole), Partition(1, 1))
    batches = [tiny_batch(whole, labels="tokens", seed=n) for n in range(2)]
    both = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    train = Train(steps=1, learning_rate=0.01)
    expected = train_unsplit(whole, [both], train)
    assert FineTuning(party, train).step(*batches) == pytest.approx(expected[0], rel=1e-6)
    names = dict(whole.named_parameters())
    for name, weight in party.named_parameters():
        assert torch.allclose(weight, names[name], atol=1e-5), name


RAGGED = {
    "llama": ("causal-lm", "tokens"),
    "t5": ("seq2seq", "tokens"),
    "bert": ("classification", "classes"),
}


@pytest.mark.parametrize("kind", RAGGED)
@pytest.mark.parametrize("sizes", [(1, 3), (2, 1, 1)], ids=str)
def test_ragged_batches_make_the_step_of_all_as_one(kind, sizes):
    task, labels = RAGGED[kind]
    torch.manual_seed(1)
    whole = tiny_model(kind, task).eval()
    whole.config.decoder_start_token_id = 0
    for module in whole.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    party, _ = split(copy.deepcopy(whole), Partition(1, 0) if kind == "bert" else Partition(1, 1))
    parts = [tiny_batch(whole, labels=labels, seed=n) for n in range(3)]
    one = {key: torch.cat([part[key] for part in parts])[: sum(sizes)] for key in parts[0]}
    if labels == "tokens":
        for row in range(len(one["labels"])):
            one["labels"][row, row + 2 :] = -100  # each row teaches another number of tokens
    micro = [
        {key: value.clone() for key, value in zip(one, rows, strict=True)}
        for rows in zip(*(value.split(sizes) for value in one.values()), strict=True)
    ]
    train = Train(steps=1, learning_rate=0.01, optimizer="sgd", clip=0.0)
    expected = train_unsplit(whole, [one], train)
    assert FineTuning(party, train).step(*micro) == pytest.approx(expected[0], rel=1e-5)
    names = dict(whole.named_parameters())
    for name, weight in party.named_parameters():
        assert torch.allclose(weight, names[name], atol=1e-6), name


def test_a_batch_that_teaches_nothing_changes_nothing():
    whole = tiny_model("llama")
    party, _ = split(copy.deepcopy(whole), Partition(1, 1))
    batch = tiny_batch(whole, labels="tokens")
    empty = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    train = Train(steps=1, learning_rate=0.01)
    assert [FineTuning(party, train).step(empty, batch)] == train_unsplit(whole, [batch], train)


def test_the_learning_rate_follows_its_schedule():
    train = Train(steps=12, learning_rate=1.0, schedule="linear", warmup=2)
    assert [train.rate(n) for n in (0, 1, 2, 7, 11)] == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.1])
    assert Train(steps=4, learning_rate=1.0, schedule="cosine").rate(2) == pytest.approx(0.5)


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_step_with_a_gradient_that_is_not_finite_is_skipped_by_both(parties, clip):
    with torch.no_grad():
        next(parties.data_party.parameters()).fill_(float("nan"))
    before = [p.clone() for p in parties.model_party.parameters()]
    FineTuning(parties.data_party, Train(steps=1, clip=clip)).step(parties.batch)
    assert all(map(torch.equal, before, parties.model_party.parameters()))
    assert parties.data_party.step == 1


def test_a_refused_step_changes_neither_party(parties):
    both = [*parties.data_party.parameters(), *parties.model_party.parameters()]
    fine_tuning = FineTuning(parties.data_party, Train(steps=2))
    kept = parties.data_party.model(**parties.batch, use_cache=False).loss
    before = [p.clone() for p in both]
    with pytest.raises(ProtocolError, match="still waits for its backward"):
        fine_tuning.step(parties.batch)
    assert all(map(torch.equal, before, both))
    del kept


def test_a_model_party_without_trainable_weights_counts_steps_all_the_same(parties):
    parties.model_party.model.requires_grad_(requires_grad=False)
    before = [p.clone() for p in parties.model_party.parameters()]
    fine_tuning = FineTuning(parties.data_party, Train(steps=2))
    losses = [fine_tuning.step(parties.batch) for _ in range(2)]
    assert losses[1] < losses[0]
    assert all(map(torch.equal, before, parties.model_party.parameters()))
