"""Vocabulary search recovers undefended text exactly, honestly, and through known noise."""

from __future__ import annotations

import attrs
import pytest
import torch
from torch.nn.functional import cosine_similarity, normalize
from transformers.utils.generic import ModelOutput

from vflair_attacks.linear_inverter import LinearMap
from vflair_attacks.matching import measure_of
from vflair_attacks.proposals import Proposals, calibrated
from vflair_attacks.vocabulary_search import GreedySearch, VocabularySearch
from vflair_core import AttackError, Guess, Partition, Transcript, split
from vflair_core.attacks.attack import launch
from vflair_core.attacks.halves import halves
from vflair_core.attacks.observables import Observables
from vflair_core.defenses.mechanism import Mechanism
from vflair_core.testing import numbers_as_texts, tiny_model, tiny_tokenizer

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


def test_what_is_not_finite_is_refused_by_its_name():
    *seen, _ = defended(lambda hidden: hidden / 0)
    with pytest.raises(AttackError, match="the model diverged"):
        VocabularySearch()(*seen)


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


# -- proposals -------------------------------------------------------------------------------------------


def proposing(kind="llama", width=32, texts=4, change=lambda hidden: hidden, **options):
    """What an attack may ask for at K2, of texts in which each token says much of the next, and the texts."""
    torch.manual_seed(0)
    model = tiny_model(
        kind, vocab_size=VOCABULARY, hidden_size=width, initializer_range=0.02, **options
    )
    head, _ = halves(model, Partition(2, 1))
    ids = torch.randint(3, VOCABULARY, (texts, 8))
    public = torch.randint(3, VOCABULARY, (600, 8))
    return ids, {
        "releases": change(head(ids))[None],
        "lengths": torch.full((texts,), 8),
        "head": head,
        "pretrained_model": model,
        "tokenizer": tiny_tokenizer(VOCABULARY),
        "public_texts": numbers_as_texts(public),
    }


@pytest.mark.parametrize("source", ["prior", "linear", "prior+linear"])
@pytest.mark.parametrize("attack", [VocabularySearch, GreedySearch])
def test_proposals_change_what_a_search_costs_and_not_what_it_finds(attack, source):
    ids, knowledge = proposing()
    guess = launch(attack(proposals=source), knowledge)
    assert torch.equal(guess.tokens, ids)
    most = {"prior": 0.7, "linear": 0.1, "prior+linear": 0.1}[source] * ids.numel() * VOCABULARY
    assert guess.budget["forwards"] < most


@pytest.mark.parametrize(
    ("kind", "options"),
    [("bloom", {"n_layer": 4}), ("mistral", {"sliding_window": 4, "num_key_value_heads": 1}), ("mamba", {})],
)  # fmt: skip
def test_heads_that_cannot_read_candidates_in_one_sequence_are_searched_too(kind, options):
    ids, knowledge = proposing(kind, texts=2, **options)
    knowledge.pop("pretrained_model")
    assert torch.equal(launch(VocabularySearch(proposals="linear"), knowledge).tokens, ids)


@pytest.mark.parametrize("orders", ["of all", "of a text"])
def test_the_first_token_tells_the_order_of_the_coordinates_in_which_a_map_reads_the_rest(orders):
    ids, knowledge = proposing()
    order = torch.stack([torch.randperm(32) for _ in ids])
    order = order[:1].expand_as(order) if orders == "of all" else order
    seen = knowledge["releases"].gather(-1, order[None, :, None].expand(1, -1, 8, -1))
    knowledge["releases"] = seen + 1e-6 * torch.randn_like(seen)  # what other hardware rounds
    guess = launch(VocabularySearch("sorted", proposals="linear"), knowledge)
    assert torch.equal(guess.tokens, ids)
    assert guess.budget["forwards"] < VOCABULARY + 0.1 * 7 * len(ids) * VOCABULARY


class KnownOrder(Mechanism):
    def expected(self, hidden):
        return hidden.flip(-1)


def test_to_know_the_order_does_not_hurt():
    ids, knowledge = proposing()
    knowledge["releases"] = knowledge["releases"].flip(-1)
    blind = VocabularySearch("sorted", proposals="linear", candidates=64)
    told = launch(blind, knowledge | {"mechanism": KnownOrder()})
    assert torch.equal(told.tokens, ids)
    assert told.budget["forwards"] <= launch(blind, knowledge).budget["forwards"]


@pytest.mark.parametrize("limits", [{"candidates": 64}, {"forwards": 1000}])
@pytest.mark.parametrize("plan", [("likelihood", "prior"), ("sorted", "linear")])
def test_a_first_token_of_which_nothing_is_known_is_looked_for_among_all(plan, limits):
    ids, knowledge = proposing()
    assert int(ids[:, 0].max()) > 512  # tokens that an order by number would not reach
    guess = launch(VocabularySearch(*plan, **limits), knowledge)
    assert torch.equal(guess.tokens[:, 0], ids[:, 0])


@pytest.mark.parametrize("texts", [1, 4])
def test_a_first_token_that_a_map_proposes_is_looked_for_among_no_more_than_asked(texts):
    ids, knowledge = proposing(texts=texts)
    knowledge["releases"] = knowledge["releases"] + torch.randn(1, *ids.shape, 32)
    plan = VocabularySearch(proposals="prior+linear", candidates=64, beam=1)
    assert launch(plan, knowledge).budget["forwards"] == 64 * ids.numel()


def test_where_each_row_has_an_order_of_its_own_the_map_is_of_no_use_and_the_text_is_read_all_the_same():
    ids, knowledge = proposing(texts=2)
    rows = [row[torch.randperm(32)] for row in knowledge["releases"].view(-1, 32)]
    knowledge["releases"] = torch.stack(rows).view_as(knowledge["releases"])
    guess = launch(VocabularySearch("sorted", proposals="linear"), knowledge)
    assert torch.equal(guess.tokens, ids)
    assert guess.budget["forwards"] > 0.2 * 7 * len(ids) * VOCABULARY


def test_where_nothing_is_near_all_tokens_are_tried_as_without_proposals():
    ids, knowledge = proposing()
    knowledge["releases"][:, 0] += 0.5 * knowledge["releases"].std() * torch.randn(1, 8, 32)
    plain = launch(VocabularySearch(), knowledge)
    guess = launch(VocabularySearch(proposals="linear"), knowledge)
    assert torch.equal(guess.tokens, plain.tokens)
    assert torch.equal(guess.tokens[1:], ids[1:])
    assert guess.budget["forwards"] > 8 * VOCABULARY  # of the first victim


def test_what_is_accepted_is_the_first_that_is_near_enough():
    ids, knowledge = proposing()
    guess = launch(VocabularySearch(proposals="prior", accept=1e3, prior=0, beam=1), knowledge)
    assert accuracy(guess, ids) < 0.5  # the best of the first 64
    assert guess.budget["forwards"] == 7 * 4 * 64 + 64  # all first positions are one


def test_hypotheses_of_one_text_that_read_different_tokens_are_tried_apart():
    ids, knowledge = proposing(texts=1)
    known = KnownNoise(0.1 * float(knowledge["releases"].square().mean().sqrt()))
    known.in_nats = True
    plan = VocabularySearch(proposals="prior+linear", candidates=200, beam=2, margin=1e9)
    guess = launch(plan, knowledge | {"mechanism": known})
    assert torch.equal(guess.tokens, ids)


def test_no_more_candidates_are_scored_than_asked_for():
    ids, knowledge = proposing()
    noise = 0.3 * float(knowledge["releases"].square().mean().sqrt())
    knowledge["releases"] = knowledge["releases"] + noise * torch.randn(1, *ids.shape, 32)
    known = KnownNoise(noise)
    known.in_nats = True
    plain = launch(VocabularySearch(beam=2), knowledge | {"mechanism": known})
    plan = VocabularySearch(proposals="prior+linear", candidates=200, beam=2)
    guess = launch(plan, knowledge | {"mechanism": known})
    assert guess.budget["forwards"] < 0.25 * plain.budget["forwards"]
    assert accuracy(guess, ids) > accuracy(plain, ids) - 0.1
    blind = launch(
        attrs.evolve(plan, proposals="prior", candidates=1), knowledge | {"mechanism": known}
    )
    assert accuracy(blind, ids) < accuracy(guess, ids)


@pytest.mark.parametrize(
    ("source", "gone", "possible"),
    [
        ("prior", ["pretrained_model"], '"all", "linear"'),
        ("linear", ["public_texts"], '"all", "prior"'),
        ("prior+linear", ["tokenizer", "pretrained_model"], '"all"'),
    ],
)
def test_what_proposals_are_made_of_must_be_granted(source, gone, possible):
    _, knowledge = proposing()
    for name in gone:
        del knowledge[name]
    for attack in (VocabularySearch, GreedySearch):
        with pytest.raises(AttackError, match=f"granted here it can be {possible}\\."):
            launch(attack(proposals=source), knowledge)


def test_candidates_are_ordered_by_cosine_and_log_probability():
    table, states, said = torch.randn(9, 4), torch.randn(2, 4), torch.randn(2, 3, 9)
    linear = LinearMap(
        torch.zeros(2, 4), torch.ones(4), torch.eye(4), torch.zeros(2, 4), normalize(table, dim=-1)
    )
    both = Proposals(linear, prior=True).first(states, said, 9, position=1)
    for n in range(2):
        for w in range(3):
            worth = [
                60 * float(cosine_similarity(states[n], table[v], dim=0)) + float(said[n, w, v])
                for v in range(9)
            ]
            assert both[n, w].tolist() == sorted(range(9), key=lambda v: -worth[v])
    assert torch.equal(
        Proposals(None, prior=True).first(states, said, 9, 1), said.argsort(-1, True)
    )
    assert Proposals(None, prior=True).first(states, None, 9, 0).tolist() == [[list(range(9))]]


class Rounded(Mechanism):
    """Keeps `levels` levels between the largest magnitudes of a row."""

    def __init__(self, levels):
        self.levels = levels

    def expected(self, hidden):
        return hidden

    def sample(self, hidden, generator):
        step = hidden.abs().amax(-1, keepdim=True) / self.levels
        return (hidden / step).round() * step


def test_public_text_tells_how_near_a_true_token_comes():
    _, knowledge = proposing()
    head, rows = knowledge["head"], [torch.randint(3, VOCABULARY, (8,)) for _ in range(8)]
    limits = {}
    for levels in (1e9, 1e3, 1):
        known = Rounded(levels)
        limits[levels] = calibrated(
            head, measure_of("likelihood", known), known, rows, None, torch.Generator()
        )
    assert 0 < limits[1e9] < limits[1e3] < 0.1
    assert limits[1] == 0  # what is left of a row is as near to wrong tokens


def test_what_is_rounded_is_accepted_early_by_who_knows_it_and_tried_in_full_by_who_does_not():
    known = Rounded(1e3)
    ids, knowledge = proposing(change=lambda hidden: known.sample(hidden, None))
    plan = VocabularySearch(proposals="linear")
    informed = launch(plan, knowledge | {"mechanism": known})
    blind = launch(plan, knowledge)
    assert torch.equal(informed.tokens, ids)
    assert torch.equal(blind.tokens, ids)
    assert informed.budget["forwards"] < 0.2 * blind.budget["forwards"]


def test_a_limit_on_candidates_holds_for_the_mean_of_a_group():
    ids, knowledge = proposing()
    guess = launch(VocabularySearch(proposals="linear", forwards=3 * 64), knowledge)
    assert guess.budget["forwards"] <= 3 * 64 * len(ids)
    assert bool((guess.tokens >= 0).all())


def test_a_limit_on_candidates_buys_a_guess_at_every_position_of_who_does_not_know_the_noise():
    """Nothing is ever near, so without the law the first token would take all, and .00 would look like a defense."""
    ids, knowledge = proposing(width=64)
    noise = 0.1 * float(knowledge["releases"].square().mean().sqrt())
    knowledge["releases"] = knowledge["releases"] + noise * torch.randn(1, *ids.shape, 64)
    plan = VocabularySearch(proposals="prior+linear", beam=2, forwards=1024)
    guess = launch(plan, knowledge)
    assert bool((guess.tokens >= 0).all())
    assert guess.budget["forwards"] <= 1024 * len(ids)
    assert accuracy(guess, ids) > 0.9


def test_a_token_that_comes_late_in_its_order_takes_what_others_left():
    ids, knowledge = proposing(texts=1)
    free = launch(VocabularySearch(proposals="prior"), knowledge).budget["forwards"]
    limit = int(1.5 * free)
    guess = launch(VocabularySearch(proposals="prior", forwards=limit), knowledge)
    assert torch.equal(guess.tokens, ids)
    even = launch(VocabularySearch(proposals="prior", candidates=int(free) // 8), knowledge)
    assert not torch.equal(even.tokens, ids)  # the same number for each position does not


class DrawnNoise(KnownNoise):
    """Gaussian noise whose likelihood is known, and which can be drawn again."""

    in_nats = True

    def sample(self, hidden, generator):
        return hidden + self.sigma * torch.randn(hidden.shape, generator=generator)


@pytest.mark.parametrize(("size", "sure"), [(0.2, True), (2.0, False)])
def test_with_known_noise_a_token_that_costs_no_more_nats_than_true_ones_is_taken_early(size, sure):
    ids, knowledge = proposing(width=64)
    known = DrawnNoise(size * float(knowledge["releases"].square().mean().sqrt()))
    knowledge["releases"] = known.sample(
        knowledge["releases"].expand(3, -1, -1, -1), torch.Generator()
    )
    knowledge["mechanism"] = known
    guess = launch(VocabularySearch(proposals="linear", beam=1), knowledge)
    every = ids.numel() * VOCABULARY
    if sure:
        assert torch.equal(guess.tokens, ids)
        assert guess.budget["forwards"] < 0.5 * every
    else:
        assert guess.budget["forwards"] == every  # no limit tells them apart, so all are tried


def test_nats_that_are_accepted_can_be_said():
    _, knowledge = proposing()
    knowledge["mechanism"] = DrawnNoise(0.1 * float(knowledge["releases"].std()))
    plan = VocabularySearch(proposals="prior", accept=1e12, prior=0, beam=1)
    guess = launch(plan, knowledge)
    assert (
        guess.budget["forwards"] == 7 * 4 * 64 + 64
    )  # the best of the first 64, all first positions in one
