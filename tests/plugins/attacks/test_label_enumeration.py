"""Enumeration finds every label that the loss was computed with, and says where it cannot."""

from __future__ import annotations

import pytest
import torch

from vflair_attacks.label_enumeration import LabelEnumeration
from vflair_core import AttackError, Partition
from vflair_core.attacks.attack import launch
from vflair_core.testing import tiny_model

DROPLESS = {
    "gpt2": {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "roberta": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}


def classes(count: int, labels: int, lengths=(6, 4, 7)):
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(labels, (count,), generator=generator)
    batches = [
        {
            "input_ids": torch.randint(3, 64, (1, lengths[n % 3]), generator=generator),
            "labels": label[None],
        }
        for n, label in enumerate(chosen)
    ]
    return batches, chosen


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2", "llama"])
@pytest.mark.parametrize("labels", [2, 20])
def test_every_class_is_found_at_every_number_of_classes(crossing, kind, labels):
    model = tiny_model(kind, "classification", num_labels=labels, **DROPLESS.get(kind, {}))
    batches, truth = classes(24, labels)
    guess = launch(LabelEnumeration(), crossing(model, Partition(1, 2), batches))
    assert torch.equal(guess.labels, truth)


def test_dropout_in_the_victims_tail_costs_some_labels_and_not_the_attack(crossing):
    """The victim trains with dropout 0.1 and the attacker has no part in its randomness; chance is 1/5."""
    torch.manual_seed(0)
    model = tiny_model("bert", "classification", num_labels=5)
    batches, truth = classes(40, 5)
    guess = launch(LabelEnumeration(), crossing(model, Partition(1, 1), batches))
    hits = float((guess.labels == truth).float().mean())
    assert 0.7 < hits < 1.0


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2"])
def test_the_text_of_a_language_model_is_read_off_from_its_end(crossing, kind):
    model = tiny_model(kind, vocab_size=300, **DROPLESS.get(kind, {}))
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 300, (1, n), generator=generator) for n in (9, 5, 12)]
    batches = [{"input_ids": row, "labels": row} for row in rows]
    seen = crossing(model, Partition(1, 2), batches, "causal-lm")
    guess = launch(LabelEnumeration(), seen)
    for found, row in zip(guess.tokens, rows, strict=True):
        assert torch.equal(found[1 : row.shape[1]], row[0, 1:])
        assert found[0] == -1
        assert bool((found[row.shape[1] :] == -1).all())


def test_a_prompt_without_labels_gives_no_guess(crossing):
    model = tiny_model("llama", vocab_size=300)
    ids = torch.randint(3, 300, (1, 10), generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    labels[:, :6] = -100
    seen = crossing(model, Partition(1, 1), [{"input_ids": ids, "labels": labels}], "causal-lm")
    guess = launch(LabelEnumeration(), seen)
    assert torch.equal(guess.tokens[0, 6:], ids[0, 6:])
    assert guess.tokens[0, :6].tolist() == [-1] * 6


def test_labels_drawn_anew_are_not_found(crossing):
    """The negative control: the gradient decides, not the attacker's model of the text."""
    batches, _ = classes(60, 2)
    seen = crossing(tiny_model("llama", "classification"), Partition(1, 1), batches)
    others = torch.randint(2, (60,), generator=torch.Generator().manual_seed(5))
    hits = (launch(LabelEnumeration(), seen).labels == others).float().mean()
    assert 0.25 < float(hits) < 0.75  # 60 fair coins: 4 standard errors


def test_in_ht_it_points_to_the_attack_that_needs_no_weights(crossing):
    model = tiny_model("bert", "classification")
    batches, _ = classes(2, 2)
    knowledge = {**crossing(model, Partition(1, 0), batches), "tail": None}
    with pytest.raises(AttackError, match="use gradient-sign"):
        launch(LabelEnumeration(), knowledge)
