"""Victims that share an update: what is shared, and grades that do not ask for the order of a sum."""

from __future__ import annotations

import copy
import itertools
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vflair_core import AttackError, Example, Guess, Partition, split
from vflair_core.attacks.halves import Head
from vflair_core.errors import ExperimentError
from vflair_core.experiments.capture import record_updates, record_victims
from vflair_core.experiments.config import experiment_from
from vflair_core.experiments.grading.answer_key import AnswerKey
from vflair_core.experiments.grading.matching import best_assignment, matched, together
from vflair_core.experiments.grading.performance import grade, performance
from vflair_core.experiments.grading.statistics import interval
from vflair_core.experiments.grading.tokens import checked_tokens, grade_tokens
from vflair_core.experiments.grading.truth import Truth
from vflair_core.testing import numbers_as_texts, tiny_model, tiny_tokenizer
from vflair_core.training.fine_tuning import FineTuning, Train


def texts_of(lengths, vocabulary=50):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, vocabulary, (n,), generator=generator) for n in lengths]


def truth_of(tokens, size, **more):
    private = [torch.ones(len(t), dtype=torch.bool) for t in tokens]
    return Truth(tokens, private, update_batch=size, **more)


def padded(rows, width=8):
    out = torch.full((len(rows), width), -1)
    for n, row in enumerate(rows):
        out[n, : len(row)] = row
    return out


# -- pairing ---------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(1, 5).flatmap(lambda n: st.lists(st.lists(st.integers(0, 6), min_size=n, max_size=n), min_size=n, max_size=n)))  # fmt: skip
def test_the_best_assignment_is_the_best_of_all_permutations(scores):
    rows = best_assignment(scores)
    assert sorted(rows) == list(range(len(scores)))

    def total(order):
        return sum(scores[row][column] for column, row in enumerate(order))

    assert total(rows) == max(total(order) for order in itertools.permutations(range(len(scores))))


def test_alone_each_row_is_its_own_victims_whatever_fits_better():
    assert matched(3, 1, lambda row, victim: float(row != victim)) == [(0, 0), (1, 1), (2, 2)]
    assert matched(3, 1, lambda row, victim: 0.0, shift=1) == [(2, 0), (0, 1), (1, 2)]


def test_rows_stay_within_their_update_or_in_the_one_they_are_shifted_to():
    assert {r // 2 - v // 2 for r, v in matched(6, 2, lambda *_: 0.0)} == {0}
    assert [(r // 2, v // 2) for r, v in matched(6, 2, lambda *_: 0.0, shift=1)][::2] == [(2, 0), (0, 1), (1, 2)]  # fmt: skip


# -- grades ----------------------------------------------------------------------------------------------


def test_the_order_within_an_update_does_not_count_and_the_order_of_updates_does():
    tokens = texts_of([6, 4, 5, 6])
    there = truth_of(tokens, 2)
    swapped = padded([tokens[n] for n in (1, 0, 3, 2)])
    exchanged = padded([tokens[n] for n in (2, 3, 0, 1)])
    whole = grade_tokens(
        Guess(tokens=swapped), there, None, lambda _: "", name="a", knowledge=("K3", "updates")
    )
    assert whole.hits == [(10, 10), (11, 11)]
    assert (whole.attack_performance, whole.details["exact_sequences"]) == (1.0, 1.0)
    assert whole.floors["mismatched"] == whole.floors["others"]
    assert performance(Guess(tokens=exchanged), there, range(4)) < 0.3
    assert performance(Guess(tokens=swapped), truth_of(tokens, 1), range(4)) < 0.3


def test_floors_get_the_best_order_too():
    """By hand: a guess of each update against the other update, in the better of the two orders."""
    tokens = texts_of([5, 5, 5, 5], vocabulary=6)
    guess = texts_of([5, 5, 5, 5, 5, 5, 5, 5], vocabulary=6)[4:]
    found = grade_tokens(
        Guess(tokens=torch.stack(guess)), truth_of(tokens, 2), None, lambda _: "", name="a", knowledge="K0"
    )  # fmt: skip

    def best(of, rows, victims):
        return max(
            sum(int((of[r] == tokens[v]).sum()) for r, v in zip(order, victims, strict=True))
            for order in itertools.permutations(rows)
        )

    assert found.attack_performance == (best(guess, (0, 1), (0, 1)) + best(guess, (2, 3), (2, 3))) / 20  # fmt: skip
    # A row is cut to the victim it was given to, which here changes nothing: all are of one length.
    ordered = checked_tokens(Guess(tokens=torch.stack(guess)), truth_of(tokens, 2))
    crossed = best(ordered, (0, 1), (2, 3)) + best(ordered, (2, 3), (0, 1))
    assert found.floors["mismatched"] == crossed / 20
    others = best(tokens, (0, 1), (2, 3)) + best(tokens, (2, 3), (0, 1))
    assert found.floors["others"] == others / 20


def test_where_nothing_graded_tells_rows_apart_all_that_was_sent_does():
    """Nothing is private, and the answers are the last two tokens: they decide whose row is whose."""
    tokens = texts_of([5, 5])
    there = Truth(
        tokens,
        [torch.zeros(5).bool()] * 2,
        answers=[torch.tensor([0, 0, 0, 1, 1]).bool()] * 2,
        update_batch=2,
    )
    rows = checked_tokens(Guess(tokens=torch.stack([tokens[1], tokens[0]])), there)
    assert torch.equal(torch.stack(rows), torch.stack(tokens))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_floor_of_labels_is_the_best_set_of_labels_for_every_update(size):
    labels = torch.tensor([0, 1, 1, 0, 2, 1, 0, 0, 1, 2, 0, 1])
    there = truth_of([torch.tensor([1])] * 12, size, labels=labels)
    found = grade(
        Guess(labels=torch.zeros(12).long()),
        there,
        None,
        None,
        name="a",
        knowledge=("K0", "updates"),
    )

    def share(said):
        right = sum(
            max(
                sum(a == b for a, b in zip(order, update, strict=True))
                for order in itertools.permutations(said)
            )
            for update in labels.view(-1, size).tolist()
        )
        return right / 12

    every = itertools.combinations_with_replacement(range(3), size)
    assert found.floors["constant"] == pytest.approx(max(map(share, every)))
    assert found.attack_performance == pytest.approx(5 / 12)


def test_labels_of_one_update_are_counted_in_any_order_and_have_no_ranks():
    there = truth_of([torch.tensor([1])] * 4, 2, labels=torch.tensor([0, 1, 1, 1]))
    guess = Guess(labels=torch.tensor([1, 0, 1, 0]), scores=torch.rand(4))
    found = grade(guess, there, None, None, name="a", knowledge=("K0", "updates"))
    assert found.attack_performance == 3 / 4
    assert "auc" not in found.details
    assert performance(guess, there, range(4)) == 3 / 4


def test_places_of_answers_too_are_given_to_whom_they_fit():
    one, other = torch.tensor([0, 1, 1]).bool(), torch.tensor([1, 0, 0]).bool()
    there = truth_of([torch.arange(3)] * 4, 2, answers=[one, other, one, one])
    guess = Guess(answers=torch.stack([other, one, one, one]))
    assert grade(guess, there, None, None, name="a", knowledge="K0").attack_performance == 1.0


def test_the_interval_draws_updates_as_wholes():
    hits = [(1, 1), (1, 1), (0, 1), (0, 1)] * 3
    assert together(hits, 2) == [(2, 2), (0, 2)] * 3
    low, high = interval(together(hits, 2))
    alone = interval(hits)
    assert low < alone[0]
    assert high > alone[1]


def test_only_guesses_from_updates_are_graded_without_order():
    key = AnswerKey(truth_of(texts_of([4, 4]), 1), (0,), truth_of(texts_of([4]), 1), update_batch=2)
    assert key.truth.update_batch == 1
    updates = key.for_updates()
    assert updates.control is not None
    assert (updates.truth.update_batch, updates.control.update_batch) == (2, 2)


# -- what is shared --------------------------------------------------------------------------------------


def test_an_update_is_the_unsplit_models_gradient_of_the_padded_batch():
    model = tiny_model("llama")
    rows = texts_of([7, 4, 6, 5])
    examples = [Example(text) for text in numbers_as_texts(rows)]
    party, _ = split(copy.deepcopy(model), Partition(1, 1), tokenizer=tiny_tokenizer(64))
    FineTuning(party, Train())  # opens the session in which a step can be skipped
    crossed = record_victims(party, examples, max_length=16, gradients=True)
    updates = record_updates(party, crossed.rows, 2, max_length=16)
    assert len(updates) == 2
    assert all(weight.grad is None for weight in party.model.parameters())
    for n, update in enumerate(updates):
        some = rows[2 * n : 2 * n + 2]
        mask = torch.tensor([[i < len(row) for i in range(7 if n == 0 else 6)] for row in some])
        ids = torch.zeros(mask.shape, dtype=torch.long)
        ids[mask] = torch.cat(some)
        model.zero_grad()
        model(input_ids=ids, attention_mask=mask.long(), labels=ids.masked_fill(~mask, -100)).loss.backward()  # fmt: skip
        weights = dict(model.named_parameters())
        assert set(update) == {name for name, _ in party.model.named_parameters()}
        for name, gradient in update.items():
            torch.testing.assert_close(gradient, weights[name].grad)


def test_a_model_that_asks_twice_cannot_be_run_as_one_chain():
    party = types.SimpleNamespace(stages=("encoder", "decoder"), model="T5")
    nothing = torch.zeros(1, 1, 4)
    with pytest.raises(AttackError, match="asks the model party 2 times in a forward"):
        Head(party).returned(None, inputs_embeds=nothing, attention_mask=nothing[..., 0])


def test_a_guarantee_counts_the_round_in_which_a_batch_crosses():
    examples = [Example(text) for text in numbers_as_texts(texts_of([5] * 8))]
    party, _ = split(tiny_model("llama"), Partition(1, 1), tokenizer=tiny_tokenizer(64))
    FineTuning(party, Train())
    crossed = record_victims(party, examples, max_length=16, gradients=True)
    alone = party.releases
    record_updates(party, crossed.rows, 4, max_length=16)
    assert alone.gradients == 1
    assert party.releases == alone + alone


SHORTEST = {"task": {"name": "words"}, "model": {"name": "m"}}


@pytest.mark.parametrize(
    ("victims", "words"),
    [
        ({"update_batch": 2}, "no updates are shared. Set victims.share_updates = true"),
        (
            {"update_batch": 3, "share_updates": True},
            r"victims.count = 16, victims.bypass = 4, but",
        ),
        ({"update_batch": 4, "share_updates": True, "development": 2}, "Give multiples of 4"),
        (
            {"update_batch": 8, "share_updates": True, "bypass": 8, "development": 8},
            "fewer than two updates",
        ),
    ],
)
def test_batches_that_do_not_fit_the_victims_are_refused_with_the_reason(victims, words):
    with pytest.raises(ExperimentError, match=words):
        experiment_from({**SHORTEST, "victims": victims})
