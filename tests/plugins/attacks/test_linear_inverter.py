"""The linear inverter: the ridge of the textbook, and what it reads of text that it never saw."""

from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import Ridge
from torch.nn.functional import cosine_similarity

from vflair_attacks.linear_inverter import LinearInverter, fitted
from vflair_core import AttackError, Partition
from vflair_core.attacks.attack import launch
from vflair_core.testing import crossed, numbers_as_texts, tiny_model, tiny_tokenizer

VOCABULARY, LENGTH = 200, 8


def victims(kind="gpt2", lengths=(LENGTH,) * 6):
    model = tiny_model(kind, vocab_size=VOCABULARY, hidden_size=32, initializer_range=0.02)
    rows = [torch.randint(3, VOCABULARY, (n,)) for n in lengths]
    public = torch.randint(3, VOCABULARY, (400, LENGTH))
    texts = {"tokenizer": tiny_tokenizer(VOCABULARY), "public_texts": numbers_as_texts(public)}
    return rows, crossed(model, Partition(2, 1), rows) | texts


def accuracy(guess, rows) -> float:
    pairs = zip(guess.tokens, rows, strict=True)
    return float(torch.cat([found[: len(row)] == row for found, row in pairs]).float().mean())


def drawn(states, ids):
    """Draw rows of states and tokens by their numbers."""
    return lambda numbers: (states[numbers], ids[numbers])


@pytest.fixture
def pairs():
    """States with one huge coordinate and one that never moves, and tokens of them: (20, 9, 6), (20, 9)."""
    states = torch.randn(20, 9, 6)
    states[..., 0] = 1e3 + 50 * states[..., 0]
    states[..., 1] = 4.0
    ids = torch.randint(0, 30, (20, 9))
    ids[3:, 7:] = -100
    return states, ids, torch.randn(30, 5)


@pytest.mark.parametrize("ridge", [0.1, 10.0])
def test_it_is_the_ridge_regression_of_the_textbook(pairs, ridge):
    states, ids, table = pairs
    linear, used, tokens = fitted(drawn(states, ids), 20, table, LinearInverter(ridge=ridge))
    real = ids[:, 1:] >= 0
    rows = states[:, 1:][real].double()
    moving = [0, 2, 3, 4, 5]
    spread = rows[:, moving].std(0, correction=0)
    scaled = (rows[:, moving] - rows[:, moving].mean(0)) / spread
    book = Ridge(alpha=ridge).fit(scaled.numpy(), table[ids[:, 1:][real]].double().numpy())
    made = torch.from_numpy(book.predict(scaled.numpy())).float()
    expected = cosine_similarity(made[:, None], table[None], dim=-1)
    assert torch.allclose(
        linear.cosines(rows.float(), torch.ones(len(rows), dtype=torch.long)), expected, atol=1e-4
    )
    assert (used, tokens) == (20, int(real.sum()))


def test_first_positions_are_read_by_the_same_map_around_means_of_their_own(pairs):
    states, ids, table = pairs
    states[..., 1] = torch.randn(20, 9)
    linear, _, _ = fitted(drawn(states, ids), 20, table, LinearInverter())
    moved = states[:, 0] - states[:, 0].mean(0) + states[:, 1:][ids[:, 1:] >= 0].mean(0)
    made = moved - linear.means[1]
    expected = made / linear.spread @ linear.weight + table[ids[:, 0]].mean(0)
    expected = cosine_similarity(expected[:, None], table[None], dim=-1)
    found = linear.cosines(states[:, 0], torch.zeros(20, dtype=torch.long))
    assert torch.allclose(found, expected, atol=1e-4)


def test_first_positions_and_padding_are_not_fitted_on(pairs):
    states, ids, table = pairs
    before, _, _ = fitted(drawn(states, ids), 20, table, LinearInverter())
    spoilt = states.clone()
    spoilt[:, 0] = 1e5
    spoilt[ids < 0] = -1e5
    after, _, _ = fitted(drawn(spoilt, ids), 20, table, LinearInverter())
    assert torch.equal(before.weight, after.weight)
    assert torch.equal(before.means[1], after.means[1])


def test_it_ends_with_the_tokens_that_are_enough(pairs):
    states, ids, table = pairs
    plan = LinearInverter(tokens=20, batch=2)
    assert fitted(drawn(states, ids), 20, table, plan)[1:] == (4, 3 * 8 + 6)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_text_is_read_off_undefended_hidden_states(kind):
    rows, knowledge = victims(kind, lengths=(8, 3, 5, 8, 8))
    guess = launch(LinearInverter(), knowledge)
    assert accuracy(guess, rows) >= 0.9
    assert bool((guess.tokens[~knowledge["mask"]] == -1).all())
    assert guess.budget == {"forwards": 400, "public_tokens": 400 * 7}


def test_answered_queries_serve_where_the_head_is_unknown():
    rows, knowledge = victims()
    public = torch.randint(3, VOCABULARY, (400, LENGTH))
    head = knowledge.pop("head")
    knowledge["embeddings"] = head.embeddings  # as in K1
    secret = torch.randn(32, 32)
    knowledge["releases"] = knowledge["releases"] @ secret
    answers = head(public) @ secret
    knowledge["queries"] = list(zip(numbers_as_texts(public), answers, strict=True))
    guess = launch(LinearInverter(), knowledge)
    assert accuracy(guess, rows) >= 0.9
    assert (guess.budget["forwards"], guess.budget["queries"]) == (0, 400)
    few = launch(LinearInverter(queries=3), knowledge)
    assert few.budget["queries"] == 3
    assert accuracy(few, rows) < 0.5


def test_releases_of_a_victim_are_averaged():
    rows, knowledge = victims()
    seen, scale = knowledge["smashed"], float(knowledge["smashed"].square().mean().sqrt())
    noisy = seen + scale * torch.randn(16, *seen.shape)
    often = launch(LinearInverter(), {**knowledge, "releases": noisy})
    once = launch(LinearInverter(), {**knowledge, "releases": noisy[:1]})
    assert accuracy(often, rows) > accuracy(once, rows) + 0.1


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        (("head",), "grant embeddings, or a head"),
        (("public_texts",), "needs public texts, and there are 0"),
    ],
)
def test_an_error_says_what_is_missing(gone, said):
    _, knowledge = victims()
    for name in gone:
        del knowledge[name]
    with pytest.raises(AttackError, match=said):
        launch(LinearInverter(), knowledge)


def test_without_a_head_queries_are_asked_for():
    _, knowledge = victims()
    knowledge["embeddings"] = knowledge.pop("head").embeddings
    with pytest.raises(AttackError, match="grant a head, or queries"):
        launch(LinearInverter(), knowledge)


def test_texts_of_one_token_are_refused():
    _, knowledge = victims()
    knowledge["public_texts"] = ["4", "5", "6"]
    with pytest.raises(AttackError, match="more than one token"):
        launch(LinearInverter(), knowledge)
