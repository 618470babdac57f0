"""`assert_attack_contract` passes what keeps the rules, and names the rule that is broken."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from attrs import define, frozen

from vflair_core import AttackError, Guess, Partition
from vflair_core.testing import assert_attack_contract, crossed, tiny_batch, tiny_model

CALLS = []


def nearest(smashed, mask, embeddings):
    return Guess(tokens=torch.where(mask, torch.cdist(smashed, embeddings).argmin(-1), -1))


@frozen
class Drawn:
    """Guesses at random, from its own stream."""

    words: int = 60

    def __call__(self, mask, generator):
        return Guess(tokens=torch.randint(3, self.words, mask.shape, generator=generator))


def initialised(smashed, mask):
    """Layers are initialised from torch's global stream, which the process of an attack seeds."""
    layer = torch.nn.Linear(smashed.shape[-1], 64)
    return Guess(tokens=layer(smashed).argmax(-1).masked_fill(~mask, -1))


def first_class(lengths):
    return Guess(labels=torch.zeros_like(lengths))


def test_an_attack_that_keeps_the_rules_passes_and_its_guess_comes_back():
    words = list(torch.randint(3, 64, (3, 5)))
    guess = assert_attack_contract(nearest, partition=Partition(0, 1), rows=words, reads=1.0)
    assert torch.equal(guess.tokens, torch.stack(words))


@pytest.mark.parametrize("attack", [Drawn, Drawn(20), initialised])
def test_what_draws_from_its_own_stream_or_a_seeded_one_passes(attack):
    assert_attack_contract(attack)


def test_an_attack_on_labels_passes_on_a_model_with_classes():
    model = tiny_model("bert", "classification", num_labels=3)
    assert_attack_contract(first_class, model=model)


def by_python(mask):
    return Guess(tokens=torch.full(mask.shape, random.randrange(64)))


def by_numpy(mask):
    return Guess(tokens=torch.from_numpy(np.random.randint(0, 64, tuple(mask.shape))))  # noqa: NPY002


def by_what_it_remembers(mask):
    CALLS.append(1)
    return Guess(tokens=torch.full(mask.shape, len(CALLS) % 64))


def by_its_process(mask):
    return Guess(tokens=torch.full(mask.shape, 3 + ("PYTEST_CURRENT_TEST" in os.environ)))


def clears(smashed, mask):
    smashed.zero_()
    return Guess(tokens=torch.full(mask.shape, 3))


def trains_what_is_not_its_own(body, mask):
    with torch.no_grad():
        for weight in body.parameters():
            weight += 1
    return Guess(tokens=torch.full(mask.shape, 3))


CACHE = {}


def what_it_guessed_first(mask, smashed):
    key = tuple(mask.shape)
    if key not in CACHE:
        CACHE[key] = (smashed.sum(-1).abs() * 100).long() % 64
    return Guess(tokens=CACHE[key])


def changes_updates(updates, mask):
    next(iter(updates[0].values())).zero_()
    return Guess(tokens=torch.full(mask.shape, 3))


def changes_records(rounds, mask):
    rounds[0].tensor.zero_()
    return Guess(tokens=torch.full(mask.shape, 3))


def changes_the_head(head, mask):
    with torch.no_grad():
        next(iter(head._party.model.parameters())).zero_()
    return Guess(tokens=torch.full(mask.shape, 3))


def one_member(candidates, lengths):
    return Guess(members=torch.ones(1))


def nan_scores(lengths):
    return Guess(scores=torch.full(lengths.shape, torch.nan))


def flat_answers(lengths):
    return Guess(answers=lengths > 0)


def wants_logits(logits, mask):
    return Guess(tokens=torch.full(mask.shape, 3))


def wants_classes(known_labels, mask):
    return Guess(tokens=torch.full(mask.shape, 3))


@frozen
class WithFolder:
    folder: Path = Path()

    def __call__(self, mask):
        return Guess(tokens=torch.full(mask.shape, 3))


@frozen
class Needing:
    words: int

    def __call__(self, mask):
        return Guess(tokens=torch.full(mask.shape, self.words))


def too_few(mask):
    return Guess(tokens=torch.full(mask.shape, 3)[1:])


def too_short(mask):
    return Guess(tokens=torch.full(mask.shape, 3)[:, 1:])


def no_word(mask):
    return Guess(tokens=torch.full(mask.shape, 64))


def no_class(lengths):
    return Guess(labels=torch.full_like(lengths, 2))


@pytest.mark.parametrize(
    ("attack", "rule"),
    [
        (by_python, "where Python or NumPy draw other numbers"),
        (by_numpy, "where Python or NumPy draw other numbers"),
        (by_what_it_remembers, "where Python or NumPy draw other numbers"),
        (by_its_process, "in a process of its own"),
        (clears, r"changes what it is given \(smashed\)"),
        (trains_what_is_not_its_own, r"changes what it is given \(body\)"),
        (what_it_guessed_first, "or on what it guessed before"),
        (changes_updates, r"changes what it is given \(updates\)"),
        (changes_records, r"changes what it is given \(rounds\)"),
        (changes_the_head, r"changes what it is given \(head\)"),
        (one_member, "members for 1 candidates of 6"),
        (nan_scores, "scores that are not a number"),
        (flat_answers, r"answers of shape \(3,\)"),
        (wants_logits, r"logits needs HT: partition=Partition\(head, 0\)"),
        (wants_classes, "known_labels needs a model with classes"),
        (WithFolder(), "nothing that JSON can hold"),
        (Needing, r"give an object that has them, Needing\(...\)"),
        (too_few, "tokens for 2 victims of 3"),
        (too_short, r"of shape \(3, 6\) for victims of up to 7"),
        (no_word, "tokens outside of -1 to 63"),
        (no_class, "labels outside of -1 to 1"),
        (lambda mask: Guess(tokens=torch.full(mask.shape, 3)), "cannot be imported"),
    ],
)
def test_each_broken_rule_is_named(attack, rule):
    with pytest.raises(AssertionError, match=rule):
        assert_attack_contract(attack)


def test_an_attack_that_reads_too_little_is_told_how_much():
    with pytest.raises(AssertionError, match=r"reads 0\.\d\d where 0\.90 was to be read"):
        assert_attack_contract(Drawn, reads=0.9)


def test_a_name_that_does_not_exist_is_refused():
    def asks(smashd):
        return Guess(tokens=smashd)

    with pytest.raises(AttackError, match=r"'smashd', which is not knowledge. Did you mean"):
        assert_attack_contract(asks)


@define
class Holder:
    """An options class whose attack lies elsewhere."""

    def method(self, mask):
        return Guess(tokens=torch.full(mask.shape, 3))


def test_a_method_is_no_attack_that_can_be_found_again():
    with pytest.raises(AssertionError, match=r"is not|cannot be imported"):
        assert_attack_contract(Holder().method)


def test_everything_is_each_name_of_the_vocabulary(vflair_knowledge):
    from vflair_core.attacks.knowledge import VOCABULARY

    knowledge = vflair_knowledge()
    model = tiny_model("llama")
    told = set(VOCABULARY) - {"adversary_state"}  # there is no active adversary
    told -= {"logits"}  # of HT
    told -= {"mechanism", "gradient_mechanism", "replacement", "parameters"}  # there is no defense
    told -= {"known_labels"}  # of classes
    assert told <= set(knowledge)
    assert torch.equal(knowledge["rows"][0], tiny_batch(model)["input_ids"][0])
    alone = crossed(model, Partition(1, 1), knowledge["rows"], knowledge="K0")
    assert torch.equal(knowledge["smashed"], alone["smashed"])
