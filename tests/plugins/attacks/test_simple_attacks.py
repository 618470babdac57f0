"""Nearest embedding and the sign of the gradient, against answers known by construction."""

from __future__ import annotations

import pytest
import torch

from vflair_attacks.gradient_sign import GradientSign
from vflair_attacks.nearest_embedding import NearestEmbedding
from vflair_core import AttackError, Partition, Transcript, split
from vflair_core.attacks.attack import launch
from vflair_core.attacks.observables import Observables
from vflair_core.testing import tiny_model


def training_round(kind, task, partition, batches):
    """Cross each example alone with its backward, and return what the model party saw."""
    party, _ = split(tiny_model(kind, task=task), partition)
    party.model.train()
    with party.channel.tap(Transcript()) as transcript:
        for batch in batches:
            party.model(**batch, use_cache=False).loss.backward()
    knowledge = {"partition": partition, "task_kind": task}
    return {**Observables(transcript.messages, is_ht=partition.kind == "HT"), **knowledge}


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2"])
def test_the_gradient_of_the_logits_is_the_text_in_ht_training(kind):
    torch.manual_seed(0)
    rows = [torch.randint(3, 60, (1, n)) for n in (7, 4)]
    batches = [{"input_ids": row, "labels": row} for row in rows]
    guess = launch(GradientSign(), training_round(kind, "causal-lm", Partition(1, 0), batches))
    for found, row in zip(guess.tokens, rows, strict=True):
        assert torch.equal(found[1 : row.shape[1]], row[0, 1:])
        assert found[0] == -1
        assert bool((found[row.shape[1] :] == -1).all())


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2"])
def test_the_gradient_of_the_logits_is_the_class_in_ht_training(kind):
    torch.manual_seed(0)
    labels = [1, 0, 0, 1, 1]
    batches = [
        {"input_ids": torch.randint(3, 60, (1, 6)), "labels": torch.tensor([label])}
        for label in labels
    ]
    guess = launch(GradientSign(), training_round(kind, "classification", Partition(1, 0), batches))
    assert guess.labels.tolist() == labels


def test_the_sign_is_no_label_in_hbt_and_the_attack_says_so():
    ids = torch.randint(3, 60, (1, 5))
    knowledge = training_round(
        "gpt2", "causal-lm", Partition(1, 1), [{"input_ids": ids, "labels": ids}]
    )
    with pytest.raises(AttackError, match="gradient that crosses is of hidden states"):
        launch(GradientSign(), knowledge)


def test_unlabelled_rows_give_no_guess():
    gradient = torch.tensor([[[0.2, -0.5, 0.3], [0.0, 0.0, 0.0], [0.1, 0.1, -0.2]]])
    guess = GradientSign()(gradient, torch.tensor([3]), Partition(1, 0), "causal-lm")
    assert guess.tokens.tolist() == [[-1, 1, -1]]


def test_nearest_embedding_finds_scaled_and_slightly_moved_embeddings():
    torch.manual_seed(0)
    table = torch.randn(50, 16)
    ids = torch.randint(50, (3, 4))
    mask = torch.tensor([[True] * 4, [True] * 2 + [False] * 2, [True] * 3 + [False]])
    smashed = 7 * table[ids] + 0.01 * torch.randn(3, 4, 16)
    guess = NearestEmbedding(chunk=5)(smashed, mask, table)
    assert torch.equal(guess.tokens[mask], ids[mask])
    assert bool((guess.tokens[~mask] == -1).all())
