"""Vocabulary search recovers undefended text exactly, honestly, and through known noise."""

from __future__ import annotations

import pytest
import torch
from transformers.utils.generic import ModelOutput

from vflair_attacks.vocabulary_search import GreedySearch, VocabularySearch
from vflair_core import AttackError, Guess, Partition, Transcript, split
from vflair_core.attacks.attack import launch
from vflair_core.attacks.halves import halves
from vflair_core.attacks.observables import Observables
from vflair_core.defenses.mechanism import Mechanism
from vflair_core.testing import tiny_model

VOCABULARY = 1000
EXAMPLES, LENGTH = 3, 6


def crossing(model, partition, ids):
    """What the model party saw of `ids`: one message per example, and the head an attacker holds."""
    head, _ = halves(model, partition)
    party, _ = split(model, partition)
    party.model.eval()
    with party.channel.tap(Transcript()) as transcript, torch.no_grad():
        for row in ids:
            party.model(row[None], use_cache=False)
    return Observables(transcript.messages, is_ht=partition.kind == "HT"), head


def accuracy(guess: Guess, ids) -> float:
    return float((guess.tokens == ids).float().mean())


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2"])
@pytest.mark.parametrize(
    "partition",
    [Partition(head, tail) for head in range(4) for tail in range(4 - head)],
    ids=lambda p: f"{p.kind}-{p.head}-{p.tail}",
)
def test_undefended_text_is_recovered_whole_at_every_cut(kind, partition):
    torch.manual_seed(0)
    model = tiny_model(kind, vocab_size=VOCABULARY)
    ids = torch.randint(3, VOCABULARY, (EXAMPLES, LENGTH))
    seen, head = crossing(model, partition, ids)
    guess = launch(VocabularySearch(beam=2), {**seen, "head": head})
    assert torch.equal(guess.tokens, ids)


def test_the_greedy_baseline_recovers_undefended_text_too():
    torch.manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (EXAMPLES, LENGTH))
    seen, head = crossing(tiny_model("gpt2", vocab_size=VOCABULARY), Partition(2, 1), ids)
    assert torch.equal(launch(GreedySearch(), {**seen, "head": head}).tokens, ids)


def test_examples_of_different_lengths_are_searched_together_and_padded_with_minus_one():
    torch.manual_seed(0)
    rows = [torch.randint(3, VOCABULARY, (n,)) for n in (5, 2, 7, 2)]
    seen, head = crossing(tiny_model("llama", vocab_size=VOCABULARY), Partition(1, 1), rows)
    guess = launch(VocabularySearch(group=3), {**seen, "head": head})
    for found, row in zip(guess.tokens, rows, strict=True):
        assert torch.equal(found[: len(row)], row)
        assert bool((found[len(row) :] == -1).all())


class KnownNoise(Mechanism):
    def __init__(self, sigma: float) -> None:
        self.sigma = sigma

    def log_likelihood(self, observed, hidden):
        return -(observed - hidden).square().sum(-1) / (2 * self.sigma**2)


def noisy(sigma: float, releases: int):
    torch.manual_seed(0)
    model = tiny_model("gpt2", vocab_size=300)
    head, _ = halves(model, Partition(2, 1))
    ids = torch.randint(3, 300, (8, 10))
    clean = head(ids)
    sigma = sigma * float(clean.square().mean().sqrt())
    seen = clean + sigma * torch.randn(releases, *clean.shape)
    return seen, torch.full((8,), 10), head, ids, KnownNoise(sigma)


def test_a_beam_beats_greedy_search_under_known_noise():
    seen, lengths, head, ids, mechanism = noisy(0.5, releases=1)
    greedy = GreedySearch()(seen, lengths, head)
    beam = VocabularySearch(beam=8, prior=0)(seen, lengths, head, mechanism=mechanism)
    assert accuracy(beam, ids) > accuracy(greedy, ids) + 0.1


def test_repeated_releases_of_a_row_average_the_noise_out():
    seen, lengths, head, ids, mechanism = noisy(1.0, releases=16)
    once = VocabularySearch(beam=2, prior=0)(seen[:1], lengths, head, mechanism=mechanism)
    often = VocabularySearch(beam=2, prior=0)(seen, lengths, head, mechanism=mechanism)
    assert accuracy(often, ids) > accuracy(once, ids)
    assert accuracy(often, ids) > 0.95


def test_a_language_model_prior_decides_where_noise_drowns_the_message():
    """A prior that knows the text finds it in pure noise; without it the search cannot."""
    seen, lengths, head, ids, _ = noisy(1.0, releases=1)

    class Oracle:
        """Puts all its weight on the next true token: an extreme language model."""

        def forward(self, input_ids, cache, use_cache):
            step = 1 if cache is None else cache.step + 1
            logits = torch.full((len(input_ids), 1, 300), -50.0)
            logits[:, 0, ids[0, step]] = 50.0
            cache = cache or type("Steps", (), {"batch_select_indices": lambda *_: None})()
            cache.step = step
            return ModelOutput(logits=logits, cache=cache)

        __call__ = forward

    drowned = KnownNoise(1e6)
    found = VocabularySearch(beam=1)(
        seen[:, :1], lengths[:1], head, mechanism=drowned, pretrained_model=Oracle()
    )
    blind = VocabularySearch(beam=1, prior=0)(seen[:, :1], lengths[:1], head, mechanism=drowned)
    assert torch.equal(found.tokens[0, 1:], ids[0, 1:])
    assert accuracy(blind, ids[:1]) < 0.9


def test_an_encoder_head_is_refused_because_its_rows_see_later_tokens():
    head, _ = halves(tiny_model("bert", task="classification"), Partition(1, 1))
    with pytest.raises(AttackError, match="needs a causal head"):
        GreedySearch()(torch.zeros(1, 1, 4, 32), torch.tensor([4]), head)


class Silent(Mechanism):
    """Known to the attacker, and without a noise that could be scored."""


def test_one_example_that_nothing_explains_does_not_spoil_its_group():
    torch.manual_seed(0)
    model = tiny_model("llama", vocab_size=300)
    head, _ = halves(model, Partition(2, 1))
    ids = torch.randint(3, 300, (6, 8))
    seen = head(ids)
    seen[0] = 100 * torch.randn_like(seen[0])
    guess = VocabularySearch()(seen[None], torch.full((6,), 8), head, pretrained_model=model)
    assert torch.equal(guess.tokens[1:], ids[1:])


def test_knowing_a_mechanism_without_noise_is_no_handicap():
    """Small hidden states: squared distances taken for nats would lose against the prior."""
    torch.manual_seed(0)
    model = tiny_model("llama", vocab_size=300, initializer_range=0.02)
    head, _ = halves(model, Partition(1, 1))
    ids = torch.randint(3, 300, (4, 8))
    options = {"mechanism": Silent(), "pretrained_model": model}
    guess = VocabularySearch()(head(ids)[None], torch.full((4,), 8), head, **options)
    assert torch.equal(guess.tokens, ids)


def defended(change, kind="llama", vocabulary=VOCABULARY):
    """Hidden states of width 64 as `change` leaves them, and the text."""
    torch.manual_seed(0)
    model = tiny_model(kind, vocab_size=vocabulary, hidden_size=64, initializer_range=0.02)
    head, _ = halves(model, Partition(2, 1))
    ids = torch.randint(3, vocabulary, (4, 8))
    return change(head(ids))[None], torch.full((4,), 8), head, ids


def permuted(hidden):
    """Each row in an order of its own."""
    return torch.stack([row[torch.randperm(64)] for row in hidden.view(-1, 64)]).view_as(hidden)


def sparsified(hidden):
    """The largest 5 % of each row."""
    least = hidden.abs().topk(3, dim=-1).values[..., -1:]
    return hidden * (hidden.abs() >= least)


def four_bits(hidden):
    """Fifteen levels between the largest magnitudes of each row."""
    step = hidden.abs().amax(-1, keepdim=True) / 7
    return (hidden / step).round() * step


@pytest.mark.parametrize(
    ("change", "matching"),
    [(permuted, "sorted"), (sparsified, "support"), (four_bits, "likelihood")],
    ids=["permuted", "sparsified", "int4"],
)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_what_keeps_values_keeps_the_text(change, matching, kind):
    *seen, ids = defended(change, kind)
    assert torch.equal(VocabularySearch(matching=matching, beam=4)(*seen).tokens, ids)


@pytest.mark.parametrize("change", [permuted, sparsified])
def test_the_plain_likelihood_does_not_see_through_a_change_of_coordinates(change):
    *seen, ids = defended(change)
    assert accuracy(VocabularySearch(beam=4)(*seen), ids) < 0.5


def test_a_limit_on_candidates_leaves_later_positions_without_a_guess():
    *seen, ids = defended(lambda hidden: hidden)
    guess = VocabularySearch(beam=1, forwards=VOCABULARY * 3)(*seen)  # for each of four
    assert torch.equal(guess.tokens[:, :3], ids[:, :3])
    assert bool((guess.tokens[:, 3:] == -1).all())
    assert guess.budget["forwards"] == 4 * VOCABULARY * 3
