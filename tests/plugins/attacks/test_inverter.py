"""The learned inverter: on text it never saw, through the defense if it knows it."""

from __future__ import annotations

import pytest
import torch

from vflair_attacks.inverter import LearnedInverter
from vflair_core import AttackError, Partition
from vflair_core.attacks.attack import launch
from vflair_core.defenses.mechanism import Mechanism
from vflair_core.testing import crossed, numbers_as_texts, tiny_model, tiny_tokenizer

VOCABULARY, LENGTH = 200, 8
SMALL = LearnedInverter(network="mlp", hidden=64, steps=300)


def victims(kind="gpt2", lengths=(LENGTH,) * 6, **options):
    task = {"task": "classification"} if kind == "bert" else {}
    model = tiny_model(
        kind, vocab_size=VOCABULARY, hidden_size=32, initializer_range=0.02, **task, **options
    )
    rows = [torch.randint(3, VOCABULARY, (n,)) for n in lengths]
    public = torch.randint(3, VOCABULARY, (400, LENGTH))
    knowledge = crossed(model, Partition(1, 1), rows)
    knowledge |= {
        "tokenizer": tiny_tokenizer(VOCABULARY),
        "public_texts": numbers_as_texts(public),
    }
    return rows, knowledge


def accuracy(guess, rows) -> float:
    hits = [
        (found[: len(row)] == row).float() for found, row in zip(guess.tokens, rows, strict=True)
    ]
    return float(torch.cat(hits).mean())


@pytest.mark.parametrize("network", ["mlp", "gru"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_text_is_read_off_undefended_hidden_states(kind, network):
    rows, knowledge = victims(kind, lengths=(8, 3, 5, 8, 8))
    guess = launch(LearnedInverter(network=network, hidden=64, steps=300), knowledge)
    assert accuracy(guess, rows) >= 0.95
    assert bool((guess.tokens[~knowledge["mask"]] == -1).all())


class Noise(Mechanism):
    """A rotation and Gaussian noise; remembers what it drew."""

    def __init__(self, sigma, matrix):
        self.sigma, self.matrix, self.draws = sigma, matrix, []

    def expected(self, hidden):
        return hidden @ self.matrix

    def sample(self, hidden, generator):
        noise = torch.randn(hidden.shape, generator=generator)
        self.draws.append(noise)
        return self.expected(hidden) + self.sigma * noise


def noisy(sigma, releases=1, **options):
    rows, knowledge = victims(**options)
    scale = float(knowledge["smashed"].square().mean().sqrt())
    mechanism = Noise(sigma * scale, torch.linalg.qr(torch.randn(32, 32))[0])
    stream = torch.Generator().manual_seed(1)
    seen = [mechanism.sample(knowledge["smashed"], stream) for _ in range(releases)]
    mechanism.draws.clear()
    return rows, {**knowledge, "releases": torch.stack(seen)}, mechanism


def test_who_knows_the_mechanism_learns_through_it_and_who_does_not_reads_nothing():
    rows, knowledge, mechanism = noisy(0.3)
    assert accuracy(launch(SMALL, {**knowledge, "mechanism": mechanism}), rows) > 0.9
    assert accuracy(launch(SMALL, knowledge), rows) < 0.15


def test_every_batch_has_fresh_noise():
    _, knowledge, mechanism = noisy(0.3)
    launch(LearnedInverter(hidden=8, steps=20), {**knowledge, "mechanism": mechanism})
    flat = [draw.flatten()[:8] for draw in mechanism.draws]
    assert len(flat) > 20
    assert len(torch.stack(flat).unique(dim=0)) == len(flat)


def test_answered_queries_serve_where_the_head_is_unknown():
    rows, knowledge, mechanism = noisy(0.1)
    stream = torch.Generator().manual_seed(2)
    public = torch.randint(3, VOCABULARY, (400, LENGTH))
    head = knowledge.pop("head")
    answers = mechanism.sample(head(public), stream)
    knowledge["embeddings"] = head.embeddings  # as in K1
    knowledge["queries"] = list(zip(numbers_as_texts(public), answers, strict=True))
    assert accuracy(launch(SMALL, knowledge), rows) > 0.9


def test_log_probabilities_of_several_releases_add_up():
    rows, knowledge, mechanism = noisy(1.5, releases=16)
    often = launch(SMALL, {**knowledge, "mechanism": mechanism})
    once = {**knowledge, "releases": knowledge["releases"][:1], "mechanism": mechanism}
    assert accuracy(often, rows) > accuracy(launch(SMALL, once), rows) + 0.2


def test_a_token_that_public_text_never_has_is_found_by_its_embedding():
    rows, knowledge = victims()
    public = torch.randint(3, VOCABULARY, (400, LENGTH))
    public[public % 5 == 0] += 1
    knowledge["public_texts"] = numbers_as_texts(public)
    tokens = launch(SMALL, knowledge).tokens
    unseen = torch.stack(rows) % 5 == 0
    assert int(unseen.sum()) >= 5
    assert float((tokens == torch.stack(rows))[unseen].float().mean()) > 0.7


def test_queries_that_crossed_at_another_length_are_no_pairs():
    _, knowledge = victims()
    del knowledge["head"]
    knowledge["queries"] = [("4 5 6", torch.zeros(5, 32))] * 3
    with pytest.raises(AttackError, match="Of 3 queries 0 crossed at the length of their text"):
        launch(SMALL, knowledge)


def test_without_head_and_queries_there_is_nothing_to_learn_from():
    _, knowledge = victims()
    del knowledge["head"]
    with pytest.raises(AttackError, match="grant a head, or queries"):
        launch(SMALL, knowledge)


def test_without_public_text_the_error_says_so():
    _, knowledge = victims()
    del knowledge["public_texts"]
    with pytest.raises(AttackError, match="needs public texts, and there are 0"):
        launch(SMALL, knowledge)


def test_a_limit_on_forwards_is_kept():
    _, knowledge = victims()
    guess = launch(LearnedInverter(forwards=50, batch=16), knowledge)
    assert 50 <= guess.budget["forwards"] < 50 + 16
