"""The words behind replaced ones: posteriors as enumeration has them, and counts by hand."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from attrs import frozen

from vflair_attacks.replaced_words import ReplacementInversion, WordPairs, posterior, said_of
from vflair_core.testing import numbers_as_texts, tiny_tokenizer

INDEX = {"a": 0, "b": 1, "c": 2}
TEXTS = ["a b a c", "a b x b"]


def test_words_and_pairs_are_counted_as_by_hand():
    """After a: b twice and c once, of 3 with 2 followers; x is no word, and counts as one that is not known."""
    prior = WordPairs(INDEX, TEXTS)
    single = torch.tensor([3.5, 3.5, 1.5, 1.5]) / 10
    assert torch.allclose(prior.single, single)
    found = prior.after(torch.tensor([0, 2, -1]), torch.tensor([0, 1, 2, -1])).exp()
    expected = [
        (torch.tensor([0.0, 2.0, 1.0, 0.0]) + 2 * single) / 5,
        single,
        (torch.tensor([0.0, 1.0, 0.0, 0.0]) + single) / 2,
    ]
    assert torch.allclose(found, torch.stack(expected))
    assert torch.allclose(found.sum(1), torch.ones(3))


@pytest.mark.parametrize("seed", range(5))
def test_posteriors_are_those_of_all_texts_that_could_have_been(seed):
    stream = torch.Generator().manual_seed(seed)
    prior = WordPairs(INDEX, TEXTS)
    options = [torch.tensor(some) for some in ([0, 1, 2], [1, 2], [-1], [0, 2], [0, 1, 2])]
    scores = [torch.randn(len(some), generator=stream) for some in options]
    total = [torch.zeros(len(some)) for some in options]
    for picks in itertools.product(*(range(len(some)) for some in options)):
        words = [some[[n]] for some, n in zip(options, picks, strict=True)]
        log = prior.single[words[0]].log().sum() + sum(
            s[n] for s, n in zip(scores, picks, strict=True)
        )
        log = log + sum(prior.after(a, b).sum() for a, b in itertools.pairwise(words))
        for place, n in enumerate(picks):
            total[place][n] += log.exp()
    best = [int(some[mass.argmax()]) for some, mass in zip(options, total, strict=True)]
    assert posterior(options, scores, prior) == best


@frozen
class Next:
    """Each number is sent as the next one; 5 and 6 are the same then."""

    words: tuple[str, ...] = tuple(str(n) for n in range(3, 20))

    def log_probabilities(self, numbers):
        said = torch.zeros(len(numbers), len(self.words))
        said[torch.arange(len(numbers)), (numbers + 1) % len(self.words)] = 1.0
        return said.log()


def test_a_table_made_in_pieces_is_the_whole_table():
    whole = Next().log_probabilities(torch.arange(17))[:, [3, 7]]
    assert torch.equal(said_of(Next(), [3, 7], chunk=5), whole)


@frozen
class Scrambled:
    """Half of the time any of twelve words is sent."""

    words: tuple[str, ...] = tuple("abcdefghijkl")

    def log_probabilities(self, numbers):
        said = torch.full((len(numbers), 12), 0.5 / 12)
        said[torch.arange(len(numbers)), numbers] += 0.5
        return said.log()


def test_what_public_text_says_undoes_part_of_a_random_replacement():
    """Of 1,600 words each alone is right at 1/2 + 1/24; one of two words follows each, which finds .13 more of them."""
    chooser, words = random.Random(0), Scrambled().words

    def text():
        at = [chooser.randrange(12)]
        for _ in range(7):
            at.append((at[-1] + chooser.choice((1, 3))) % 12)
        return [words[n] for n in at]

    true = [text() for _ in range(200)]
    sent = [[chooser.choice(words) if chooser.random() < 0.5 else w for w in row] for row in true]
    public = [" ".join(text()) for _ in range(60)]
    found = ReplacementInversion().before([" ".join(row) for row in sent], Scrambled(), public)
    right = sum(
        w == v
        for row, made in zip(true, found, strict=True)
        for w, v in zip(row, made.split(), strict=True)
    )
    assert right / 1600 >= 1 / 2 + 1 / 24 + 0.13


def test_tokens_are_read_and_words_put_back_and_strangers_stay():
    """Tokens are nearest embeddings here, exactly; 30 is no word of the defense."""
    table = torch.eye(40)
    sent = torch.tensor([[5, 9, 30, 4, 0], [7, 7, 7, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]).bool()
    smashed = table[sent] * mask[..., None]
    guess = ReplacementInversion()(
        smashed, smashed[None], mask, mask.sum(1), table, tiny_tokenizer(40),
        numbers_as_texts([torch.tensor([3, 4, 5])]), torch.Generator(), replacement=Next(),
    )  # fmt: skip
    assert guess.tokens.tolist() == [[4, 8, 30, 3, -1], [6, 6, 6, -1, -1]]
    blind = ReplacementInversion()(
        smashed, smashed[None], mask, mask.sum(1), table, tiny_tokenizer(40), [], torch.Generator()
    )
    assert torch.equal(blind.tokens, sent.masked_fill(~mask, -1))


def test_releases_that_are_drawn_anew_add_up():
    """Of 1,600 words half are any of twelve in each release; four of them leave little to guess, without any prior."""
    chooser, words = random.Random(0), Scrambled().words
    true = [[chooser.choice(words) for _ in range(8)] for _ in range(200)]

    def release():
        rows = [
            [chooser.choice(words) if chooser.random() < 0.5 else w for w in row] for row in true
        ]
        return [" ".join(row) for row in rows]

    texts = [release() for _ in range(4)]
    right = []
    for count in (1, 2, 4):
        others = list(zip(*texts[1:count], strict=True)) if count > 1 else ()
        found = ReplacementInversion().before(texts[0], Scrambled(), [], others)
        pairs = [
            (w, v)
            for row, made in zip(true, found, strict=True)
            for w, v in zip(row, made.split(), strict=True)
        ]
        right.append(sum(w == v for w, v in pairs) / len(pairs))
    assert right[0] < right[1] + 0.03 < right[2]
    assert right[2] >= 0.72


def test_releases_are_read_one_by_one_at_their_own_lengths():
    table = torch.eye(40)
    first, second = torch.tensor([[5, 9, 30, 4]]), torch.tensor([[5, 9, 30, 0]])
    releases = torch.stack([table[first], table[second] * (second > 0)[..., None]])
    mask = torch.ones(1, 4).bool()
    guess = ReplacementInversion()(
        releases[0], releases, mask, mask.sum(1), table, tiny_tokenizer(40),
        numbers_as_texts([torch.tensor([3, 4, 5])]), torch.Generator(), replacement=Next(),
    )  # fmt: skip
    assert guess.tokens.tolist() == [[4, 8, 30, 3]]


def test_an_answer_that_the_gradient_shows_stays_as_it_was_read():
    """The last two tokens are learnt: the gradient begins one row before the first of them."""
    table, sent = torch.eye(40), torch.tensor([[5, 9, 4, 7]])
    mask = torch.ones(1, 4).bool()
    gradient = torch.tensor([0.0, 1.0, 1.0, 0.0])[None, :, None].expand(1, 4, 40)
    guess = ReplacementInversion()(
        table[sent], table[sent][None], mask, mask.sum(1), table, tiny_tokenizer(40), [], torch.Generator(),
        replacement=Next(), hidden_grad=gradient, task_kind="causal-lm",
    )  # fmt: skip
    assert guess.tokens.tolist() == [[4, 8, 4, 7]]
