"""Grades of labels, answers and members against counting by hand."""

from __future__ import annotations

import pytest
import torch

from vflair_core import AttackError, Guess
from vflair_core.experiments.grading.grades import with_verdict
from vflair_core.experiments.grading.labels import grade_answers, grade_labels, grade_members
from vflair_core.experiments.grading.performance import grade, performance
from vflair_core.experiments.grading.statistics import auc_either
from vflair_core.experiments.grading.tokens import grade_tokens
from vflair_core.experiments.grading.truth import Truth


def labelled(labels, known=()):
    count = len(labels)
    return Truth(
        [torch.tensor([1])] * count,
        [torch.tensor([True])] * count,
        labels=torch.tensor(labels),
        known=frozenset(known),
    )


def graded(guess, truth):
    return grade(guess, truth, None, str, name="a", knowledge="K0")


def test_labels_that_were_told_do_not_count():
    guess = Guess(labels=torch.tensor([0, 0, 1, 1, 0]))
    told = graded(guess, labelled([1, 0, 1, 0, 0], known={0, 1}))
    assert told.attack_performance == pytest.approx(2 / 3)  # of 1, 0, 0 it said 1, 1, 0
    assert told.floors["constant"] == pytest.approx(2 / 3)


def test_auc_is_of_the_class_that_the_attack_names_against_the_rest():
    scores = torch.tensor([3.0, 2.0, 1.0, 0.0])
    truth = labelled([2, 2, 0, 1])
    guess = Guess(scores=scores, labels=torch.zeros(4).long(), positive=2)
    assert graded(guess, truth).details["auc"] == 1.0
    reversed_ = Guess(scores=-scores, labels=torch.zeros(4).long(), positive=2)
    assert graded(reversed_, truth).details["auc"] == 0.0


def test_the_better_orientation_of_noise_is_below_its_permutation_null_as_often_as_said():
    """100 draws of pure noise: 95 expected, binomial standard error 2.2."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(24) % 3 == 0
    below = 0
    for _ in range(100):
        either, null = auc_either(
            torch.randn(24, generator=generator), labels.long(), permutations=200
        )
        assert 0.5 <= either <= 1.0
        assert null > 0.6  # a fair coin is no floor for the better of two orientations
        below += either <= null
    assert below >= 88


def test_places_of_answers_are_counted_position_by_position():
    truth = Truth(
        [torch.arange(4), torch.arange(2)],
        [torch.zeros(4).bool(), torch.zeros(2).bool()],
        answers=[torch.tensor([False, False, True, True]), torch.tensor([False, True])],
    )
    said = torch.tensor([[False, True, True, True], [False, True, True, True]])
    found = graded(Guess(answers=said), truth)
    assert found.target == "answers"
    assert found.attack_performance == pytest.approx(5 / 6)
    assert found.floors["constant"] == pytest.approx(1 / 2)  # half of all six positions
    # The first guess fits the second text at 2 of 2, the second guess the first text at 3 of 4.
    assert found.floors["mismatched"] == pytest.approx(5 / 6)


def test_bare_texts_have_no_answers_to_place():
    with pytest.raises(AttackError, match="Bare texts have no answers"):
        grade_answers(
            Guess(answers=torch.zeros(2, 3).bool()), Truth([], []), name="a", knowledge="K0"
        )


def test_tokens_of_the_answer_are_graded_apart_from_private_ones():
    truth = Truth(
        [torch.tensor([5, 6, 7, 8])],
        [torch.tensor([True, True, False, False])],
        answers=[torch.tensor([False, False, True, True])],
    )
    guess = Guess(tokens=torch.tensor([[5, 6, 0, 8]]))
    prompt, response = (
        grade_tokens(guess, about, None, str, name="a", knowledge="K0")
        for about in (truth, truth.of_responses())
    )
    assert (prompt.attack_performance, response.attack_performance) == (1.0, 0.5)
    assert response.floors["constant"] == 1.0  # the one answer there is


def test_an_answer_written_where_answers_end_is_no_recovery():
    """Two answers of three tokens behind prompts of any length: who sees lengths only is right of half of them."""
    draw = torch.Generator().manual_seed(0)
    answers = torch.tensor([[901, 902, 903], [911, 912, 913]])
    rows, places, guesses = [], [], []
    for n in range(40):
        length = int(torch.randint(8, 25, (), generator=draw))
        prompt = torch.randint(0, 800, (length,), generator=draw)
        rows.append(torch.cat([prompt, answers[n % 2]]))
        places.append(torch.arange(length + 3) >= length)
        guess = torch.full((27,), -1)
        guess[length : length + 3] = answers[0]
        guesses.append(guess)
    truth = Truth(rows, [~there for there in places], answers=places).of_responses()
    guess = Guess(tokens=torch.stack(guesses))
    found = with_verdict(
        grade_tokens(guess, truth, None, str, name="a", knowledge="K0"), None, None
    )
    assert found.attack_performance == 0.5
    assert found.floors["constant"] == 0.5  # the better of the two answers
    # Of each answer half of the 39 others have the same: 19.
    assert found.floors["others"] == pytest.approx(19 / 39)
    assert found.floors["mismatched"] == pytest.approx(0.5)
    assert not found.informative


def test_members_are_candidates_scored_above_zero():
    truth = Truth(
        [torch.tensor([1])] * 2, [torch.tensor([True])] * 2, members=torch.tensor([1, -1, 0, -1])
    )
    found = graded(Guess(members=torch.tensor([0.3, 0.1, -0.2, -0.5])), truth)
    assert (found.target, found.attack_performance, found.floor) == ("members", 0.5, 0.5)
    assert found.details["auc"] == pytest.approx(
        3 / 4
    )  # of four pairs, (-.2, .1) is the wrong way round
    assert with_verdict(found, None, None).informative is False


def test_of_some_victims_only_those_candidates_count_that_could_be_among_them():
    truth = Truth(
        [torch.tensor([1])] * 2, [torch.tensor([True])] * 2, members=torch.tensor([1, -1, 0, -1])
    )
    guess = Guess(members=torch.tensor([0.3, 0.1, -0.2, -0.5]))
    assert performance(guess, truth, [1]) == pytest.approx(2 / 3)  # candidates 0, 1 and 3


def test_membership_without_candidates_and_labels_without_labels_are_refused():
    bare = Truth([torch.tensor([1])], [torch.tensor([True])])
    with pytest.raises(AttackError, match="there are no candidates"):
        grade_members(Guess(members=torch.ones(2)), bare, name="a", knowledge="K0")
    with pytest.raises(AttackError, match="this task has none"):
        grade_labels(Guess(labels=torch.zeros(1).long()), bare, name="a", knowledge="K0")
