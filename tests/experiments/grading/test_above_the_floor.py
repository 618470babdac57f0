"""Whether an attack beats its floor: an exact test on the very victims, and what depends on it."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vflair_core import Guess
from vflair_core.experiments.grading.grades import Grade, with_verdict
from vflair_core.experiments.grading.performance import grade
from vflair_core.experiments.grading.ranking import strongest
from vflair_core.experiments.grading.statistics import Floor, chance_of_no_more
from vflair_core.experiments.grading.truth import Truth


def by_brute_force(gaps):
    """The share of all ways to turn differences round that reach as much as was seen."""
    signs = list(itertools.product((1, -1), repeat=len(gaps)))
    reached = [sum(s * abs(gap) for s, gap in zip(way, gaps, strict=True)) for way in signs]
    return sum(value >= sum(gaps) for value in reached) / len(signs)


@settings(deadline=None)
@given(
    st.integers(1, 4),
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 30)), min_size=1, max_size=9),
)
def test_the_test_is_the_share_of_all_signs(guesses, pairs):
    floor = Floor(tuple(f for _, f in pairs), guesses)
    gaps = [h * guesses - f for h, f in pairs]
    found = chance_of_no_more([(h, 9) for h, _ in pairs], floor)
    assert found == pytest.approx(by_brute_force(gaps))


def test_it_alarms_falsely_no_more_often_than_it_says():
    """Attacks that are as good as their floor: 4,000 draws, at most 5 % alarms and 4 standard errors."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, 6, (4000, 2, 12), generator=generator).tolist()
    alarms = sum(
        chance_of_no_more([(h, 5) for h in ours], Floor(tuple(theirs))) <= 0.05
        for ours, theirs in drawn
    )
    assert alarms / 4000 <= 0.05 + 4 * (0.05 * 0.95 / 4000) ** 0.5


def truth_of(rows):
    tokens = [torch.tensor(row) for row in rows]
    return Truth(tokens, [torch.ones(len(row), dtype=torch.bool) for row in tokens])


def graded(guess, truth, prior=None):
    found = grade(
        Guess(tokens=torch.tensor(guess)), truth, prior, lambda ids: "", name="a", knowledge=("K3",)
    )
    return with_verdict(found, None, None)


@pytest.mark.parametrize("others", [7, 9])
def test_a_perfect_attack_on_few_victims_is_informative_though_its_floor_is_high(others):
    """Eight victims in which one token makes 70 or 90 %: AP 1.000 over a floor of .7 or .9."""
    rows = [[5] * others + [6 + n + k for k in range(10 - others)] for n in range(8)]
    found = graded(rows, truth_of(rows))
    assert found.attack_performance == 1.0
    assert found.floor == pytest.approx(others / 10)
    assert found.interval[0] < found.floor  # by which it was called uninformative
    assert found.by_chance == pytest.approx(1 / 256)
    assert (found.informative, found.verdict) == (True, "ok")


def test_an_attack_that_says_the_floor_is_uninformative():
    rows = [[5] * 7 + [6 + n, 7 + n, 8 + n] for n in range(8)]
    found = graded([[5] * 10] * 8, truth_of(rows))
    assert found.by_chance == 1.0
    assert found.verdict.startswith("attack uninformative")


def test_one_victim_of_many_positions_is_one_victim():
    """Forty right tokens of a single victim are not forty witnesses."""
    rows = [[20 + n + k for k in range(40)] for n in range(6)]
    guess = [rows[0], *([[5] * 40] * 5)]
    found = graded(guess, truth_of(rows))
    assert found.attack_performance > found.floor
    assert not found.informative


def grade_of(name, performance, floor, *, knowledge="K3", verdict="ok", development=None):
    return Grade(
        name, (knowledge,), "tokens", performance, (0.0, 1.0), floor, {"constant": floor}, {},
        verdict=verdict, informative=verdict == "ok", development=development,
    )  # fmt: skip


def test_a_no_op_is_no_strongest_attack():
    uninformative = "attack uninformative: it is at the floor without a defense"
    noop = grade_of("noop", 0.0, 0.1, verdict=uninformative)
    assert strongest([noop]) == []
    best = strongest([noop, grade_of("real", 0.05, 0.1)])
    assert {row["attack"] for row in best} == {"real"}


def test_the_strongest_is_the_one_furthest_above_its_own_floor():
    high_floor, low_floor = grade_of("high", 0.75, 0.7), grade_of("low", 0.6, 0.1)
    assert {row["attack"] for row in strongest([high_floor, low_floor])} == {"low"}


def test_more_knowledge_is_never_shown_below_less():
    """The attack of K4 was better on the victims that choose, and worse on those that are reported."""
    less = grade_of("less", 0.9, 0.1, knowledge="K3", development=0.5)
    more = grade_of("more", 0.125, 0.1, knowledge="K4", development=0.6)
    rows = {row["knowledge"]: row["attack_performance"] for row in strongest([less, more])}
    assert rows["K4"] >= rows["K3"] == 0.9
