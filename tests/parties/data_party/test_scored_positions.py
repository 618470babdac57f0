"""In HT, the logits of scored positions only: an opt-in that is recorded as a leak."""

from __future__ import annotations

import copy

import pytest
import torch

from vflair_core import Partition, ProtocolError, Transcript, divide, split
from vflair_core.communication.execution import Execution
from vflair_core.errors import PartitionError
from vflair_core.testing import tiny_batch, tiny_model
from vflair_core.training.fine_tuning import FineTuning, Train, train_unsplit

OPTED_IN = Partition(1, 0, only_scored=True)


def answers(model, seed=0):
    """Rows of 7 of which only the 5th (in two rows also the 6th) word is scored."""
    batch = tiny_batch(model, labels="tokens", seed=seed)
    batch["labels"][:, :4] = -100
    batch["labels"][:, 6:] = -100
    batch["labels"][0, 5] = -100
    return batch


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_loss_and_all_gradients_are_those_of_the_whole_model(kind):
    off = {f"{place}_pdrop": 0.0 for place in ("attn", "embd", "resid")} if kind == "gpt2" else {}
    whole = tiny_model(kind, **off)
    data_party, model_party = split(copy.deepcopy(whole), OPTED_IN)
    if data_party.untied:
        whole.lm_head.weight = torch.nn.Parameter(whole.lm_head.weight.detach().clone())
    batch = answers(whole)
    data_party.model.train()
    ours, theirs = data_party.model(**batch), whole.train()(**batch)
    assert torch.allclose(ours.loss, theirs.loss, rtol=1e-6)
    assert torch.allclose(ours.logits, theirs.logits[:, 3:5], rtol=1e-5, atol=1e-6)
    ours.loss.backward()
    theirs.loss.backward()
    for party in (data_party, model_party):
        for name, weight in party.named_parameters():
            expected = whole.get_parameter(name).grad
            torch.testing.assert_close(weight.grad, expected, rtol=1e-5, atol=1e-6)


def test_training_steps_go_the_way_of_the_whole_model():
    whole = tiny_model("llama")
    data_party, _ = split(copy.deepcopy(whole), OPTED_IN)
    batches = [answers(whole, seed) for seed in range(3)]
    train = Train(steps=3, learning_rate=0.05)
    tuning = FineTuning(data_party, train)
    losses = [tuning.step(batch) for batch in batches]
    assert losses == pytest.approx(train_unsplit(whole, batches, train), rel=1e-5)


def crossed(partition):
    whole = tiny_model("llama")
    data_party, _ = split(whole, partition)
    data_party.model.train()
    with data_party.channel.tap(Transcript()) as transcript:
        data_party.model(**answers(data_party.model)).loss.backward()
    return data_party, {(r.name, r.role): tuple(r.tensor.shape) for r in transcript.messages}


def test_only_those_logits_cross_in_one_exchange_and_the_positions_are_recorded_as_disclosed():
    data_party, shapes = crossed(OPTED_IN)
    assert shapes["returned", "returned"] == (3, 2, 64)
    assert shapes["hidden_grad", "hidden_grad"] == (3, 2, 64)
    assert shapes["scored_positions", "disclosed"] == (2,)
    assert data_party.disclosed == {"scored_positions"}
    assert data_party.channel.messages == 3  # open, forward, backward
    data_party, shapes = crossed(Partition(1, 0))
    assert shapes["returned", "returned"] == (3, 7, 64)
    assert data_party.disclosed == set()


def test_without_labels_and_in_evaluation_all_logits_come_back():
    whole = tiny_model("llama")
    data_party, _ = split(copy.deepcopy(whole), OPTED_IN)
    batch = answers(whole)
    assert torch.equal(data_party.model(**batch).logits, whole(**batch).logits)
    data_party.model.train()
    del batch["labels"]
    assert data_party.model(**batch).logits.shape == (3, 7, 64)


def test_a_chain_passes_the_positions_on():
    whole = tiny_model("llama")
    data_party, first = split(copy.deepcopy(whole), OPTED_IN)
    divide(first, 1, wire=True)
    data_party.model.train()
    batch = answers(whole)
    assert torch.allclose(data_party.model(**batch).loss, whole(**batch).loss, rtol=1e-6)


@pytest.mark.parametrize(
    ("model", "partition"),
    [
        (tiny_model("llama"), Partition(1, 1, only_scored=True)),
        (tiny_model("bert", "classification"), OPTED_IN),
    ],
    ids=["HBT", "classification"],
)
def test_where_there_are_no_logits_to_restrict_it_is_refused(model, partition):
    data_party, _ = split(model, partition)
    labels = "tokens" if partition.tail else "classes"
    data_party.model.train()
    with pytest.raises(PartitionError, match="only_scored restricts the logits"):
        data_party.model(**tiny_batch(model, labels=labels))


@pytest.mark.parametrize(
    "positions",
    [torch.tensor([1, 1]), torch.tensor([-1, 6]), torch.tensor([[1]]), torch.tensor([True] * 7)],
    ids=["twice", "from the end", "a table", "flags"],
)
def test_the_model_party_picks_no_position_twice(positions):
    pick = ("tuple", ("slice", None, None, None), ("leaf", 1), ("slice", None, None, None))
    step = ("op", "getitem", (("leaf", 0), pick), ())
    hidden = torch.randn(2, 7, 3)
    run = Execution(lambda *_: None, [hidden, torch.tensor([1, 3])])
    assert torch.equal(run.step(step, {}), hidden[:, [1, 3]])
    with pytest.raises(ProtocolError, match="each at most once"):
        Execution(lambda *_: None, [hidden, positions]).step(step, {})


def test_it_is_asked_for_by_an_option_and_by_no_name_of_a_tensor():
    with pytest.raises(PartitionError, match="only_scored=True"):
        Partition(1, 0, disclose=("scored_positions",))
