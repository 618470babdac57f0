"""Noise of unknown scale: the scale is found with the text, and language helps."""

from __future__ import annotations

import pytest
import torch

from vflair_attacks.beam_clean import BeamClean
from vflair_attacks.priors import BigramPrior
from vflair_core import AttackError, Partition
from vflair_core.attacks.attack import launch
from vflair_core.testing import crossed, numbers_as_texts, tiny_model, tiny_tokenizer

VOCABULARY, LENGTH, FOLLOWERS = 300, 12, 5


def language(count, chains):
    """Texts in which each token has a few followers."""
    rows = torch.empty(count, LENGTH, dtype=torch.long)
    rows[:, 0] = torch.randint(3, VOCABULARY, (count,))
    for position in range(1, LENGTH):
        chosen = torch.randint(FOLLOWERS, (count,))
        rows[:, position] = chains[rows[:, position - 1], chosen]
    return rows


def victims(sigma, head=0, kind="llama", noise=torch.randn, releases=1):
    chains = torch.randint(3, VOCABULARY, (VOCABULARY, FOLLOWERS))
    rows, public = language(8, chains), language(800, chains)
    model = tiny_model(kind, vocab_size=VOCABULARY, hidden_size=32, initializer_range=0.05)
    knowledge = crossed(model, Partition(head, 1), rows)
    scale = sigma * float(knowledge["smashed"].square().mean().sqrt())
    clean = knowledge["smashed"]
    knowledge["releases"] = clean + scale * noise(releases, *clean.shape)
    knowledge["embeddings"] = knowledge["head"].embeddings
    texts = {"tokenizer": tiny_tokenizer(VOCABULARY), "public_texts": numbers_as_texts(public)}
    return rows, {**knowledge, **texts}, scale


def without(knowledge, *names):
    return {name: value for name, value in knowledge.items() if name not in names}


def accuracy(guess, rows):
    return float((guess.tokens == rows).float().mean())


@pytest.mark.parametrize("head", [0, 2])
def test_the_scale_of_the_noise_is_found_with_the_text(head):
    rows, knowledge, scale = victims(0.6, head)
    guess = launch(BeamClean(), knowledge)
    assert accuracy(guess, rows) > 0.9
    assert guess.budget["scale"] == pytest.approx(scale, rel=0.1)


def test_the_embedding_table_alone_will_do_behind_the_embeddings():
    rows, knowledge, scale = victims(1.0)
    guess = launch(BeamClean(), without(knowledge, "head"))
    assert accuracy(guess, rows) > 0.9
    assert guess.budget["scale"] == pytest.approx(scale, rel=0.1)


def test_language_finds_what_the_nearest_embedding_does_not():
    rows, knowledge, _ = victims(1.5)
    blind = launch(BeamClean(beam=1, prior=0.0), knowledge)
    assert accuracy(launch(BeamClean(), knowledge), rows) > accuracy(blind, rows) + 0.2


def laplace(*shape):
    uniform = torch.rand(*shape) - 0.5
    return -uniform.sign() * (1 - 2 * uniform.abs()).log()


def test_laplace_noise_is_better_explained_as_what_it_is():
    rows, knowledge, scale = victims(0.9, noise=laplace)
    right = launch(BeamClean(noise="laplace", prior=0.0), knowledge)
    assert right.budget["scale"] == pytest.approx(scale, rel=0.1)
    assert accuracy(right, rows) > accuracy(launch(BeamClean(prior=0.0), knowledge), rows)


def test_repeated_releases_are_all_used():
    rows, knowledge, scale = victims(2.5, releases=8)
    guess = launch(BeamClean(prior=0.0), knowledge)
    once = launch(BeamClean(prior=0.0), {**knowledge, "releases": knowledge["releases"][:1]})
    assert accuracy(guess, rows) > accuracy(once, rows) + 0.2
    assert guess.budget["scale"] == pytest.approx(scale, rel=0.1)


def test_pairs_of_tokens_are_counted():
    rows = [torch.tensor([1, 2, 1, 2, 1, 3])]
    prior = BigramPrior(rows, vocabulary=5, pairs=0.8)
    said = prior.following(torch.tensor([[[0, 1]], [[2, 3]]]), torch.arange(2)).exp()[:, 0]
    single = torch.tensor([1, 4, 3, 2, 1]) / 11
    after_one = torch.tensor([0, 0, 2 / 3, 1 / 3, 0])
    assert torch.allclose(said[0], 0.2 * single + 0.8 * after_one)
    assert torch.allclose(said[1], single)  # nothing ever followed 3


def test_without_candidates_it_says_what_to_grant():
    _, knowledge, _ = victims(1.0)
    with pytest.raises(AttackError, match="grant embeddings or a head"):
        launch(BeamClean(), without(knowledge, "head", "embeddings"))


def test_proposals_make_it_shorter_and_find_the_same():
    rows, knowledge, _ = victims(0.6, head=2)
    every = launch(BeamClean(beam=2), knowledge)
    guess = launch(BeamClean(beam=2, proposals="linear", candidates=60), knowledge)
    assert accuracy(guess, rows) > accuracy(every, rows) - 0.05
    assert guess.budget["scale"] == pytest.approx(every.budget["scale"], rel=0.05)
    assert guess.budget["forwards"] < 0.3 * every.budget["forwards"]
    with pytest.raises(AttackError, match='proposals = "linear" takes a head'):
        launch(BeamClean(proposals="linear"), without(knowledge, "head"))
