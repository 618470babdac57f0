"""`vflair_core.testing.crossed` grants what an attack in a run would be granted."""

from __future__ import annotations

import copy

import pytest
import torch
from attrs import define, frozen

from vflair_core import AttackError, Defense, Guess, Mechanism, Partition, Replacement, launch
from vflair_core.attacks.knowledge import PRESETS, VOCABULARY, granted
from vflair_core.testing import crossed, tiny_batch, tiny_model

ALL = (
    "K4",
    "updates",
    "queries",
    "in_domain",
    "few_labelled",
    "known_labels",
    "candidates",
    "adversary_state",
)


@frozen
class Scaled(Mechanism):
    """Hidden states times a number."""

    by: float

    def expected(self, hidden):
        return self.by * hidden


@frozen
class Same(Replacement):
    words: tuple[str, ...] = ("5", "6")

    def log_probabilities(self, numbers):
        return torch.eye(2)[numbers].log()


@define
class Scale(Defense):
    """Everything that is sent, times a number that it calibrates on public text."""

    by: float = 2.0
    covers = frozenset({"prompt"})

    def prepare(self, public_texts, data_party):
        assert public_texts

    def on_smashed(self, smashed, exchange):
        return self.by * smashed

    def mechanism(self):
        return Scaled(self.by)

    def gradient_mechanism(self):
        return Scaled(1.0)

    def replacement(self, tokenizer, embeddings, public_texts):
        return Same()


def everything(kind, partition):
    model = tiny_model("llama", kind, **({"num_labels": 3} if kind == "classification" else {}))
    labels = "tokens" if kind == "causal-lm" else "classes"
    batch = tiny_batch(model, labels=labels)
    return model, batch, crossed(
        model,
        partition,
        list(batch["input_ids"]),
        labels=list(batch["labels"]),
        defenses=[Scale(3.0)],
        knowledge=ALL,
        adversary_state={"weights": torch.ones(2)},
    )  # fmt: skip


def test_every_name_of_the_vocabulary_is_granted():
    hbt = everything("causal-lm", Partition(1, 1))[2]
    ht = everything("causal-lm", Partition(1, 0))[2]
    classes = everything("classification", Partition(1, 1))[2]
    assert {*hbt, *ht, *classes} == set(VOCABULARY)
    assert set(VOCABULARY) - set(hbt) == {"logits", "known_labels"}  # of HT, and of classes


def test_what_is_granted_is_what_it_is_called():
    model, batch, told = everything("classification", Partition(1, 1))
    ids = batch["input_ids"]
    whole = copy.deepcopy(model)
    hidden = whole(input_ids=ids, output_hidden_states=True).hidden_states[1]
    assert torch.allclose(told["smashed"], 3 * hidden, atol=1e-5)
    assert torch.equal(told["mechanism"].expected(hidden), 3 * hidden)
    assert torch.equal(told["embeddings"], model.get_input_embeddings().weight)
    assert torch.equal(told["head"](ids), told["current_head"](ids))
    assert told["known_labels"] == {0: int(batch["labels"][0])}
    assert told["adversary_state"]["weights"].tolist() == [1, 1]
    assert len(told["updates"]) == len(ids)
    texts = [told["tokenizer"].decode(row) for row in ids]
    assert sum(text in texts for text in told["candidates"]) == len(told["candidates"]) // 2
    assert not set(texts) & {*told["public_texts"], *told["in_domain"]}
    text, rows = told["queries"][0]
    query = torch.tensor(told["tokenizer"](text)["input_ids"])[None]
    plain = model(input_ids=query, output_hidden_states=True).hidden_states[1][0]
    assert torch.allclose(rows, 3 * plain, atol=1e-5)


def test_gradients_of_an_update_are_those_of_the_loss_of_its_row():
    model = tiny_model("llama")
    batch = tiny_batch(model, labels="tokens")
    rows, labels = list(batch["input_ids"]), list(batch["labels"])
    told = crossed(model, Partition(1, 1), rows, labels=labels, knowledge=("K0", "updates"))
    for row, label, update in zip(rows, labels, told["updates"], strict=True):
        whole = copy.deepcopy(model)
        whole(input_ids=row[None], labels=label[None]).loss.backward()
        weights = dict(whole.named_parameters())
        for name, gradient in update.items():
            assert torch.allclose(gradient, weights[name].grad, atol=1e-6), name
        assert len(update) > 5


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_grants_no_more_than_it_says(preset):
    model = tiny_model("llama")
    told = crossed(model, Partition(1, 1), [torch.tensor([5, 6, 7])], knowledge=preset)
    assert set(told) <= granted(preset)
    missing = granted(preset) - set(told)
    gradients = {"hidden_grad", "smashed_grad", "share", "logits"}  # of training, and of HT
    assert missing <= gradients | {"mechanism", "gradient_mechanism", "replacement", "parameters"}


def test_weights_of_today_are_those_that_the_messages_come_from():
    published, current = tiny_model("llama"), tiny_model("llama", seed=1)
    ids = torch.tensor([[5, 6, 7]])
    told = crossed(published, Partition(1, 1), list(ids), current=current, knowledge="K3")
    assert torch.allclose(told["smashed"], told["current_head"](ids), atol=1e-6)
    assert torch.equal(told["head"](ids), told["current_head"](ids))
    assert not torch.allclose(told["smashed"], told["pretrained_head"](ids), atol=1e-3)
    before = crossed(published, Partition(1, 1), list(ids), current=current, knowledge="K2")
    assert torch.equal(before["head"](ids), told["pretrained_head"](ids))


@define
class Shift(Defense):
    """The next word in place of each."""

    covers = frozenset({"prompt"})

    def on_text(self, fields):
        return {n: " ".join(str(int(w) + 1) for w in t.split()) for n, t in fields.items()}


def test_texts_go_through_a_defense_of_texts():
    model = tiny_model("llama")
    told = crossed(
        model, Partition(1, 1), [torch.tensor([5, 6, 7])], defenses=[Shift()], knowledge="K2"
    )
    assert torch.allclose(told["smashed"], told["head"](torch.tensor([[6, 7, 8]])), atol=1e-6)


def test_a_name_that_does_not_exist_and_an_attack_that_asks_for_more_are_refused():
    model, row = tiny_model("llama"), torch.tensor([5, 6, 7])
    with pytest.raises(AttackError, match="Did you mean 'queries'"):
        crossed(model, Partition(1, 1), [row], knowledge="querys")
    with pytest.raises(AttackError, match="mechanism"):
        launch(
            lambda mechanism: Guess(labels=torch.zeros(1)),
            crossed(model, Partition(1, 1), [row], knowledge="K3"),
        )
