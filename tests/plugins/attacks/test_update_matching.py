"""Gradient matching on shared updates: nothing but the truth gives the update, and descent finds most of it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.functional import one_hot

from vflair_attacks.update_matching import (
    DeepLeakageOfUpdates,
    LampOfUpdates,
    TagOfUpdates,
    absolute,
    cosine,
    reorder,
    squared,
)
from vflair_attacks.update_search import Match, Model
from vflair_core import AttackError, Partition, split
from vflair_core.attacks.attack import launch
from vflair_core.attacks.halves import halves
from vflair_core.testing import tiny_model

DROPLESS = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
ALL = {"dlg": DeepLeakageOfUpdates, "tag": TagOfUpdates, "lamp": LampOfUpdates}
SIZES = {"vocab_size": 300, "hidden_size": 32, "initializer_range": 0.05}


def padded(rows):
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
    return {"input_ids": ids, "attention_mask": (labels >= 0).long(), "labels": labels}


def knowledge(kind="gpt2", partition=Partition(2, 1), lengths=(6,), size=1, **sizes):  # noqa: B008 - frozen
    """The update of the unsplit model for all rows, `size` in each, and what an attacker at K3 holds."""
    model = tiny_model(kind, **{**SIZES, **(DROPLESS if kind == "gpt2" else {}), **sizes})
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 300, (n,), generator=generator) for n in lengths]
    head, tail = halves(model, partition)
    party, model_party = split(copy.deepcopy(model), partition)
    own, updates = {name for name, _ in party.named_parameters()}, []
    for first in range(0, len(rows), size):
        model.zero_grad()
        model(**padded(rows[first : first + size]), use_cache=False).loss.backward()
        updates.append({n: w.grad.clone() for n, w in model.named_parameters() if n in own})
    seen = {
        "updates": updates,
        "lengths": torch.tensor(lengths),
        "head": head,
        "body": model_party.model.requires_grad_(False),
        "task_kind": "causal-lm",
        "generator": torch.Generator().manual_seed(0),
    }
    return seen | ({} if tail is None else {"tail": tail}), rows


def match_of(seen, distance, rows):
    model = Model("dlg-updates", seen["head"], seen["body"], seen.get("tail"), "causal-lm")
    weights = model.held(seen["updates"][0])
    sent = {name: seen["updates"][0][name] for name in weights}
    mask = padded(rows)["attention_mask"].bool()
    every = torch.ones(300, dtype=torch.bool)
    return Match(model, sent, weights, mask, distance, certain(rows), every)


def certain(rows):
    return 1e4 * one_hot(padded(rows)["input_ids"], 300).float()


@pytest.mark.parametrize("partition", [Partition(2, 1), Partition(1, 2), Partition(2, 0)], ids=str)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_update_of_the_true_text_is_the_unsplit_models_and_of_another_it_is_not(
    kind, partition
):
    seen, rows = knowledge(kind, partition, lengths=(6, 4), size=2)
    match = match_of(seen, squared, rows)
    with match.model.differentiable(match.weights):
        assert float(match.objective(certain(rows)).detach()) < 1e-9
        other = certain([rows[0].roll(1), rows[1]])
        assert float(match.objective(other).detach()) > 1e-3


@pytest.mark.parametrize("partition", [Partition(2, 1), Partition(2, 0)], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_a_text_is_found_where_chance_is_one_in_three_hundred(name, partition):
    seen, rows = knowledge(partition=partition)
    guess = launch(ALL[name](iterations=200), seen)
    assert float((guess.tokens[0] == rows[0]).float().mean()) > 0.6


def test_texts_of_a_batch_are_found_in_any_order_and_padding_is_not_guessed():
    seen, rows = knowledge(lengths=(5, 4), size=2)
    guess = launch(DeepLeakageOfUpdates(iterations=250), seen)
    assert guess.tokens[1, 4:].tolist() == [-1]
    assert len(set(guess.tokens.flatten().tolist()) & set(torch.cat(rows).tolist())) >= 5


def test_the_bag_is_the_rows_of_the_token_table_that_have_a_gradient():
    seen, rows = knowledge(tie_word_embeddings=False)
    guess = launch(DeepLeakageOfUpdates(iterations=1, bag=True), seen)
    assert set(guess.tokens.flatten().tolist()) <= set(rows[0].tolist())
    for update in seen["updates"]:
        del update["transformer.wte.weight"]
    with pytest.raises(
        AttackError, match=r"transformer.wte.weight, which is not among the updates"
    ):
        launch(DeepLeakageOfUpdates(iterations=1, bag=True), seen)


def test_the_distances_are_those_of_their_papers():
    made = [torch.tensor([1.0, 0.0]), torch.tensor([[0.0, 2.0]])]
    sent = [torch.tensor([1.0, 0.0]), torch.tensor([[2.0, 0.0]])]
    assert float(squared(made, sent)) == pytest.approx(8 / 5)
    assert float(absolute(made, sent)) == pytest.approx(4 / 3)
    assert float(cosine(made, sent)) == pytest.approx(1 - (1 + 0) / 2)


def test_a_better_order_is_taken_and_a_worse_one_is_not():
    """Started from the text with two tokens swapped, proposals alone put them right."""
    seen, rows = knowledge(lengths=(4,))
    match, plan = match_of(seen, cosine, rows), LampOfUpdates(proposals=60)
    match.soft = certain([rows[0][[0, 2, 1, 3]]])
    with match.model.differentiable(match.weights):
        reorder(match, plan, seen["generator"], None)
        assert torch.equal(match.tokens()[0], rows[0])
        reorder(match, plan, seen["generator"], None)
        assert torch.equal(match.tokens()[0], rows[0])


def test_the_attackers_weights_are_frozen_again_afterwards():
    seen, _ = knowledge(lengths=(3,))
    launch(DeepLeakageOfUpdates(iterations=1), seen)
    assert not any(weight.requires_grad for weight in seen["head"]._party.model.parameters())


def test_what_cannot_be_matched_is_refused_by_name():
    seen, _ = knowledge(lengths=(3,))
    attack = DeepLeakageOfUpdates(iterations=1)
    with pytest.raises(AttackError, match="no tail is granted: its loss is computed there"):
        launch(attack, {name: value for name, value in seen.items() if name != "tail"})
    with pytest.raises(AttackError, match="and this is classification"):
        launch(attack, {**seen, "task_kind": "classification"})
    adapters = [{"transformer.h.0.attn.c_attn.lora_A.default.weight": torch.ones(2, 32)}]
    with pytest.raises(AttackError, match=r"The updates hold .*lora_A.*use dager"):
        launch(attack, {**seen, "updates": adapters})
    _, other = halves(tiny_model("gpt2", **SIZES), Partition(2, 1))
    with pytest.raises(AttackError, match="head and tail of one time"):
        launch(attack, {**seen, "tail": other})
