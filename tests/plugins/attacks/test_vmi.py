"""Model inversion by optimisation: against the text itself, and what must not matter for it."""

from __future__ import annotations

import pytest
import torch

from vflair_attacks.patch_inversion import PatchInversion
from vflair_attacks.vmi import ModelInversion
from vflair_core import AttackError, Defense, Partition
from vflair_core.attacks.attack import launch
from vflair_core.defenses.mechanism import Mechanism
from vflair_core.testing import crossed, tiny_model

VOCABULARY = 500
HBT = Partition(1, 1)
QUICK = {
    "vmi": ModelInversion(steps=200, restarts=2),
    "patch": PatchInversion(steps=80, refine=20, restarts=2),
    "vmi-lbfgs": ModelInversion(optimizer="lbfgs", steps=80, restarts=1),
}


def victims(kind="gpt2", partition=HBT, lengths=(8, 8, 8), **options):
    rows = [torch.randint(3, VOCABULARY, (n,)) for n in lengths]
    model = tiny_model(
        kind, vocab_size=VOCABULARY, hidden_size=32, initializer_range=0.02, **options
    )
    return rows, crossed(model, partition, rows)


def accuracy(guess, rows) -> float:
    hits = [
        (found[: len(row)] == row).float() for found, row in zip(guess.tokens, rows, strict=True)
    ]
    return float(torch.cat(hits).mean())


@pytest.mark.parametrize("attack", QUICK.values(), ids=QUICK)
@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2"])
@pytest.mark.parametrize("partition", [Partition(0, 1), Partition(2, 1), Partition(2, 0)])
def test_undefended_text_is_recovered(attack, kind, partition):
    rows, knowledge = victims(kind, partition)
    assert accuracy(launch(attack, knowledge), rows) > 0.95


@pytest.mark.parametrize("loss", ["mse", "cosine"])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_an_encoder_is_inverted_by_either_loss_and_either_metric(loss, metric):
    rows, knowledge = victims("bert", task="classification")
    attack = ModelInversion(loss=loss, metric=metric, steps=200, restarts=1)
    assert accuracy(launch(attack, knowledge), rows) > 0.95


@pytest.mark.parametrize("attack", QUICK.values(), ids=QUICK)
def test_padding_explains_nothing_and_is_not_guessed(attack):
    rows, knowledge = victims(lengths=(9, 3, 6))
    knowledge["releases"][:, 1, 3:] = 1e6  # what lies there must not matter
    guess = launch(attack, knowledge)
    assert accuracy(guess, rows) > 0.95
    assert bool((guess.tokens[~knowledge["mask"]] == -1).all())


def test_several_releases_are_averaged():
    rows, knowledge = victims(lengths=(8,) * 6)
    clean = knowledge["smashed"]
    noise = torch.randn(64, *clean.shape) * clean.square().mean().sqrt()
    attack = ModelInversion(steps=200, restarts=1)
    once = launch(attack, {**knowledge, "releases": clean + noise[:1]})
    often = launch(attack, {**knowledge, "releases": clean + noise})
    assert accuracy(often, rows) > accuracy(once, rows) + 0.2


class Mixed(Mechanism):
    def __init__(self, matrix):
        self.matrix = matrix

    def expected(self, hidden):
        return hidden @ self.matrix


@pytest.mark.parametrize("attack", QUICK.values(), ids=QUICK)
def test_the_known_part_of_a_defense_is_inside_the_loss(attack):
    rows, knowledge = victims()
    matrix = torch.randn(32, 32) / 32**0.5
    knowledge["releases"] = knowledge["releases"] @ matrix
    assert accuracy(launch(attack, {**knowledge, "mechanism": Mixed(matrix)}), rows) > 0.95
    assert accuracy(launch(attack, knowledge), rows) < 0.2


def test_progress_tells_an_objective_that_falls():
    _, knowledge = victims()
    told = []
    knowledge["progress"] = lambda _done, _total, objective=None, *_: told.append(objective)
    launch(ModelInversion(steps=101, restarts=1), knowledge)
    objectives = [value for value in told if value is not None]
    assert len(objectives) == 3
    assert objectives[0] > 10 * objectives[-1]


@pytest.mark.parametrize("attack", [ModelInversion, PatchInversion])
def test_a_limit_on_forwards_is_kept(attack):
    _, knowledge = victims()
    guess = launch(attack(forwards=60, restarts=3), knowledge)
    assert 60 <= guess.budget["forwards"] / len(guess.tokens) < 90


@pytest.mark.parametrize("attack", [ModelInversion, PatchInversion])
def test_a_limit_is_for_each_victim_so_that_few_get_no_further_than_many(attack):
    """A positive control has fewer victims than what it is held against."""
    _, knowledge = victims()
    spent = []
    for count in (1, 2, 3):
        some = {"releases": knowledge["releases"][:, :count], "mask": knowledge["mask"][:count]}
        guess = launch(attack(forwards=40, batch=2), {**knowledge, **some})
        spent.append(guess.budget["forwards"] / count)
    assert max(spent) <= 1.1 * min(spent)


def test_patches_need_a_causal_head():
    _, knowledge = victims("bert", task="classification")
    with pytest.raises(AttackError, match=r"need a causal head.*Use vmi"):
        launch(PatchInversion(), knowledge)


def test_nothing_real_is_an_error():
    _, knowledge = victims()
    knowledge["mask"] = torch.zeros_like(knowledge["mask"])
    with pytest.raises(AttackError, match="nothing to invert"):
        launch(ModelInversion(), knowledge)


def test_equal_seeds_give_equal_guesses():
    _, knowledge = victims()
    tokens = []
    for _ in range(2):
        again = {**knowledge, "generator": torch.Generator().manual_seed(5)}
        tokens.append(launch(ModelInversion(steps=5), again).tokens)
    assert torch.equal(*tokens)


class NoisyEmbeddings(Defense):
    """Noise of the embeddings' size, as dx-noise adds it."""

    def on_embeddings(self, embeddings, exchange):
        drawn = torch.randn(embeddings.shape, generator=exchange.generator)
        return embeddings + drawn * embeddings.square().mean().sqrt()


def test_second_order_inversion_reads_through_noise_on_embeddings():
    """No token's row is what was sent; behind the head lies an embedding whose nearest word is still the right one."""
    rows = [torch.randint(3, VOCABULARY, (8,)) for _ in range(3)]
    model = tiny_model("gpt2", vocab_size=VOCABULARY, hidden_size=32, initializer_range=0.02)
    knowledge = crossed(model, Partition(1, 1), rows, defenses=[NoisyEmbeddings()])
    guess = launch(ModelInversion(optimizer="lbfgs", steps=150, restarts=1), knowledge)
    assert accuracy(guess, rows) > 0.9
