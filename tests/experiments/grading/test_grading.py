"""Grades against counting by hand, libraries, and attackers that cheat."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vflair_core import AttackError, Guess
from vflair_core.experiments.grading.grades import Reference, with_verdict
from vflair_core.experiments.grading.labels import grade_labels
from vflair_core.experiments.grading.statistics import auc, interval, rouge_l
from vflair_core.experiments.grading.tokens import grade_tokens
from vflair_core.experiments.grading.truth import Truth


def decode(ids) -> str:
    return " ".join(map(str, ids))


def truth(count: int = 8, length: int = 6, vocabulary: int = 500) -> Truth:
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(vocabulary, (length,), generator=generator) for _ in range(count)]
    private = [torch.ones(length, dtype=torch.bool) for _ in range(count)]
    return Truth(tokens, private, ["" for _ in tokens], [() for _ in tokens])


def graded(tokens, there: Truth, prior=None):
    return grade_tokens(Guess(tokens=tokens), there, prior, decode, name="attack", knowledge="K0")


def test_only_private_positions_count_and_each_position_counts_once():
    there = Truth(
        [torch.tensor([5, 6, 7, 8]), torch.tensor([5, 9])],
        [torch.tensor([False, True, True, True]), torch.tensor([True, True])],
    )
    grade = graded(torch.tensor([[5, 6, 0, 8], [5, 5, 5, 5]]), there)
    assert grade.attack_performance == pytest.approx(3 / 5)  # 6 and 8, then 5


def test_no_measure_looks_at_what_is_not_private():
    there = Truth(
        [torch.tensor([5, 6, 7, 8]), torch.tensor([5, 9])],
        [torch.tensor([False, True, True, False]), torch.tensor([False, False])],
    )
    wrong_elsewhere = torch.tensor([[0, 6, 7, 0], [0, 0, 0, 0]])
    right_elsewhere = torch.tensor([[5, 0, 0, 8], [5, 9, 0, 0]])
    ones = {"exact_sequences": 1.0, "rouge_l": 1.0, "bag_recall": 1.0, "bag_precision": 1.0}
    assert graded(wrong_elsewhere, there).details == ones
    assert graded(right_elsewhere, there).details == dict.fromkeys(ones, 0.0)


def test_positions_without_a_guess_are_counted_where_they_are_private_and_said_only_if_there_are_any():
    there = Truth([torch.tensor([5, 6, 7, 8])] * 2, [torch.tensor([False, True, True, True])] * 2)
    stopped = torch.tensor([[-1, 6, 7, -1], [-1, 6, 7, 8]])
    assert graded(stopped, there).details["unanswered"] == 1 / 6
    assert "unanswered" not in graded(torch.tensor([[-1, 6, 7, 0]] * 2), there).details


def test_a_text_of_which_nothing_private_was_sent_gives_nothing_to_find():
    there = Truth([torch.tensor([5, 6])] * 2, [torch.zeros(2).bool()] * 2)
    grade = graded(torch.tensor([[5, 6], [5, 6]]), there)
    assert (grade.attack_performance, grade.details["exact_sequences"]) == (0.0, 0.0)


def test_a_perfect_guess_is_one_and_permuting_the_truth_drops_it_to_the_floor():
    there = truth()
    tokens = torch.stack(there.tokens)
    whole = graded(tokens, there)
    assert whole.attack_performance == 1.0
    assert whole.details["exact_sequences"] == 1.0
    permuted = Truth(there.tokens[1:] + there.tokens[:1], there.private, there.texts, there.secrets)
    swapped = graded(tokens, permuted)
    assert swapped.attack_performance <= swapped.floor + 0.02


def test_the_floor_is_the_best_of_constant_prior_and_other_examples():
    there = Truth(
        [torch.tensor([1, 1, 1, 2]), torch.tensor([1, 2, 3, 4])], [torch.ones(4).bool()] * 2
    )
    grade = graded(
        torch.tensor([[9, 9, 9, 9], [9, 9, 9, 9]]), there, prior=torch.tensor([1, 2, 3, 4])
    )
    assert grade.floors["constant"] == pytest.approx(4 / 8)  # always 1
    assert grade.floors["prior"] == pytest.approx(5 / 8)  # 1, then all of the second
    assert grade.floors["mismatched"] == 0.0
    assert grade.floor == pytest.approx(5 / 8)


def test_mismatched_pairs_are_every_other_pair():
    there = truth(count=3, length=4, vocabulary=3)
    tokens = torch.stack(there.tokens)
    by_hand = [
        float((tokens[i] == there.tokens[j]).float().mean())
        for i in range(3)
        for j in range(3)
        if i != j
    ]
    assert graded(tokens, there).floors["mismatched"] == pytest.approx(sum(by_hand) / 6)


def test_planted_strings_count_when_the_decoded_guess_holds_them():
    there = Truth(
        [torch.tensor([1, 2, 3])] * 2, [torch.ones(3).bool()] * 2, ["", ""], [("1 2",), ("2 3",)]
    )
    grade = graded(torch.tensor([[1, 2, 9], [1, 2, 9]]), there)
    assert grade.details["planted_strings_recovered"] == 0.5


def changed_truth() -> Truth:
    """Two victims whose text a defense changed: the first lost a word, one word of the second became two tokens."""
    sent = [torch.tensor([1, 2, 4]), torch.tensor([5, 9, 9, 7])]
    original = [torch.tensor([1, 2, 3, 4]), torch.tensor([5, 6, 7])]
    return Truth(sent, [torch.ones(3).bool(), torch.ones(4).bool()], originals=original)


def test_a_changed_text_is_graded_by_what_the_guess_says_of_the_original_in_its_order():
    there = changed_truth()
    sent = torch.tensor([[1, 2, 4, -1], [5, 9, 9, 7]])  # reads all that crossed, and no more
    grade = graded(sent, there)
    assert grade.details["sent_tokens"] == 1.0
    assert grade.attack_performance == pytest.approx((3 + 2) / (4 + 3))
    assert grade.details["exact_sequences"] == 0.0
    assert grade.hits == [(3, 4), (2, 3)]


def test_a_changed_text_has_floors_of_its_own():
    same = [torch.tensor([1, 2, 3])] * 3
    there = Truth(same, [torch.ones(3).bool()] * 3, originals=[torch.tensor([1, 8, 3])] * 3)
    grade = with_verdict(graded(torch.stack(same), there), None, None)
    assert grade.floors["others"] == pytest.approx(2 / 3)  # any other text says as much
    assert "uninformative" in grade.verdict


@settings(deadline=None)  # the first example imports the library
@given(st.lists(st.integers(0, 5), max_size=12), st.lists(st.integers(0, 5), max_size=12))
def test_rouge_l_equals_the_library_on_the_same_words(guessed, true):
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    words = [" ".join(f"w{n}" for n in side) for side in (true, guessed)]
    assert rouge_l(guessed, true) == pytest.approx(scorer.score(*words)["rougeL"].fmeasure)


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 4)), min_size=2, max_size=30))
def test_auc_equals_scikit_learn(pairs):
    from sklearn.metrics import roc_auc_score

    labels = torch.tensor([int(label) for label, _ in pairs])
    scores = torch.tensor([float(score) for _, score in pairs])
    if labels.min() == labels.max():
        with pytest.raises(AttackError, match="both classes"):
            auc(scores, labels)
    else:
        assert auc(scores, labels) == pytest.approx(roc_auc_score(labels.numpy(), scores.numpy()))


def test_intervals_are_exact_binomial_at_zero_and_one_and_contain_the_rate_between():
    low, high = interval([(0, 5)] * 10)
    assert low == 0.0
    assert (1 - high) ** 10 == pytest.approx(0.025)
    low, high = interval([(5, 5)] * 10)
    assert high == 1.0
    assert low**10 == pytest.approx(0.025)
    low, high = interval([(n % 3, 4) for n in range(30)])
    assert low < 0.25 < high


def test_intervals_cover_the_true_rate_as_often_as_they_say():
    """400 studies of 40 sentences; 95 % coverage, binomial standard error 1.1 %, bootstrap slightly short."""
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(400):
        hits = torch.bernoulli(torch.full((40, 10), 0.3), generator=generator).sum(1)
        low, high = interval([(int(h), 10) for h in hits])
        covered += low <= 0.3 <= high
    assert 0.91 <= covered / 400 <= 0.98


def test_labels_are_graded_beside_the_largest_class():
    labels = torch.tensor([0, 0, 0, 1])
    there = Truth([torch.tensor([1])] * 4, [torch.tensor([True])] * 4, labels=labels)
    grade = grade_labels(Guess(labels=torch.tensor([0, 0, 0, 1])), there, name="a", knowledge="K0")
    assert grade.attack_performance == 1.0
    assert grade.floors["constant"] == 0.75


# -- cheats: each must be caught by a floor or a control ------------------------------------------------


def test_the_all_vocabulary_bag_has_full_bag_recall_and_no_performance():
    there = truth(vocabulary=6)
    grade = graded(torch.arange(6).expand(8, 6), there)
    assert grade.details["bag_recall"] == 1.0
    assert grade.attack_performance <= grade.floor


def test_constant_tokens_stay_at_the_floor_and_are_called_uninformative():
    there = truth(vocabulary=5)
    constant = torch.full((8, 6), int(torch.cat(there.tokens).mode().values))
    grade = with_verdict(graded(constant, there), None, None)
    assert "uninformative" in grade.verdict


def test_a_guess_that_fits_other_examples_fails_the_negative_control():
    """All victims share a template: a guess of it is right everywhere, with or without the message."""
    shared = torch.tensor([3, 1, 4, 1, 5, 9])
    there = Truth([shared] * 6, [torch.ones(6).bool()] * 6)
    grade = with_verdict(graded(shared.expand(6, 6), there), None, None)
    assert grade.negative_control == 1.0
    assert "negative control failed" in grade.verdict


def test_an_attack_that_cannot_read_bypassed_messages_fails_the_positive_control():
    there = truth()
    whole = Reference(1.0, informative=True)
    grade = with_verdict(graded(torch.stack(there.tokens), there), whole, 0.5)
    assert "positive control failed" in grade.verdict
    assert with_verdict(graded(torch.stack(there.tokens), there), whole, 0.97).verdict == "ok"


def test_a_guess_for_too_few_victims_is_refused():
    with pytest.raises(AttackError, match="guessed tokens for 3 of 8 victims"):
        graded(torch.zeros(3, 6, dtype=torch.long), truth())


def test_an_attack_that_found_nothing_undefended_says_nothing_about_a_defense():
    there = truth()
    grade = with_verdict(
        graded(torch.stack(there.tokens), there), Reference(0.3, informative=False), 0.9
    )
    assert "uninformative" in grade.verdict
