"""Encoders are searched one position at a time; brute force says what the best text is."""

from __future__ import annotations

import itertools

import pytest
import torch

from vflair_attacks.coordinate_search import CoordinateSearch
from vflair_core import AttackError, Partition
from vflair_core.attacks.attack import launch
from vflair_core.testing import crossed, numbers_as_texts, tiny_model, tiny_tokenizer

VOCABULARY = 200


def victims(kind="bert", partition=None, lengths=(8, 8, 3), vocabulary=VOCABULARY, spread=0.1):
    task = {"task": "classification"} if kind in ("bert", "roberta") else {}
    size = {"vocab_size": vocabulary, "hidden_size": 32, "initializer_range": spread}
    rows = [torch.randint(3, vocabulary, (n,)) for n in lengths]
    return rows, crossed(tiny_model(kind, **size, **task), partition or Partition(2, 1), rows)


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2"])
@pytest.mark.parametrize("partition", [Partition(0, 1), Partition(2, 1), Partition(3, 0)])
def test_undefended_text_is_recovered(kind, partition):
    rows, knowledge = victims(kind, partition, spread=0.05)
    guess = launch(CoordinateSearch(), knowledge)
    for found, row in zip(guess.tokens, rows, strict=True):
        assert torch.equal(found[: len(row)], row)
    assert bool((guess.tokens[~knowledge["mask"]] == -1).all())


def test_it_ends_where_no_text_that_differs_in_one_place_explains_better():
    """What was observed is noise alone, so nothing but the search itself leads there."""
    _, knowledge = victims(lengths=(3,), vocabulary=12, spread=0.3)
    knowledge["releases"] = torch.randn_like(knowledge["releases"])
    guess = launch(CoordinateSearch(candidates=0, sweeps=50), knowledge)
    every = torch.tensor(list(itertools.product(range(12), repeat=3)))
    losses = (knowledge["head"](every) - knowledge["releases"][0]).square().sum((1, 2))
    mine = losses[(every == guess.tokens[0]).all(1)]
    near = losses[(every != guess.tokens[0]).sum(1) <= 1]
    assert float(mine) == pytest.approx(float(near.min()), rel=1e-6)


def test_a_learned_inverter_can_start_it():
    rows, knowledge = victims(lengths=(8,))
    public = torch.randint(3, VOCABULARY, (200, 8))
    knowledge["tokenizer"] = tiny_tokenizer(VOCABULARY)
    knowledge["public_texts"] = numbers_as_texts(public)
    assert torch.equal(launch(CoordinateSearch(start="inverter"), knowledge).tokens[0], rows[0])


def test_a_learned_start_needs_a_tokenizer():
    _, knowledge = victims(lengths=(8,))
    with pytest.raises(AttackError, match="grant a tokenizer"):
        launch(CoordinateSearch(start="inverter"), knowledge)


def test_a_limit_on_forwards_is_kept():
    _, knowledge = victims(spread=0.3)
    guess = launch(CoordinateSearch(forwards=500), knowledge)
    assert guess.budget["forwards"] < len(guess.tokens) * (500 + 3 * (VOCABULARY + 64))
