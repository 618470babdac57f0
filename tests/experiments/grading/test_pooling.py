"""Intervals over seeds and victims: against brute force, on draws whose truth is known, and where there is little to draw."""

from __future__ import annotations

import math
import random

import pytest
import torch

from vflair_core.errors import AttackError
from vflair_core.experiments.grading.grades import Grade
from vflair_core.experiments.grading.pooling import (
    over_cells,
    paired_change,
    paired_over_cells,
    pooled_performance,
    student,
)

TOKENS = 12


def drawn(seeds, victims, *, spread=0.0, strength=3.0, own=0.0, mean=0.4):
    """Hits of a beta-binomial: seeds differ by `spread`, victims by `own` with every seed, and by chance beyond."""
    of_victims = own * torch.randn(victims).clamp(-2, 2)
    cells = []
    for _ in range(seeds):
        rate = (mean + spread * torch.randn(()).clamp(-2.5, 2.5) + of_victims).clamp(0.02, 0.98)
        share = torch.distributions.Beta(rate * strength, (1 - rate) * strength).sample()
        right = torch.binomial(torch.full((victims,), float(TOKENS)), share)
        cells.append([(int(n), TOKENS) for n in right])
    return cells


def coverage(make, *, draws=300, **options):
    found = [over_cells(make(), **options).interval for _ in range(draws)]
    return sum(low <= 0.4 <= high for low, high in found) / draws


# Of an interval that covers 95 %, 300 draws scatter by 1.3 %: the bounds are three of these away and more.
@pytest.mark.parametrize(
    ("spread", "strength"),
    [(0.0, 3.0), (0.1, 10.0), (0.15, 1000.0)],
    ids=["victims differ", "both do", "seeds differ"],
)
def test_an_interval_covers_the_truth_about_as_often_as_it_says(spread, strength):
    torch.manual_seed(1)
    held = coverage(lambda: drawn(6, 16, spread=spread, strength=strength))
    assert 0.90 <= held <= 0.99


def test_victims_that_are_the_same_with_every_seed_are_drawn_together():
    def make():
        return drawn(6, 16, spread=0.05, strength=20.0, own=0.15)

    torch.manual_seed(1)
    assert 0.90 <= coverage(make, same_victims=True) <= 0.99
    torch.manual_seed(1)
    assert coverage(make) < 0.88  # as if they were others it is too narrow


def test_the_design_effect_is_that_of_equal_clusters():
    """Kish (1965): 1 + (m - 1) rho, with rho = 1 / (a + b + 1) of a beta-binomial."""
    torch.manual_seed(0)
    found = [over_cells(drawn(1, 40)).design_effect for _ in range(100)]
    assert sum(found) / len(found) == pytest.approx(1 + (TOKENS - 1) / (3 + 1), rel=0.1)


def test_tokens_that_are_right_by_themselves_have_no_design_effect():
    torch.manual_seed(0)
    found = [over_cells(drawn(1, 40, strength=1e5)).design_effect for _ in range(100)]
    assert sum(found) / len(found) == pytest.approx(1.0, rel=0.1)


def brute_force(cells, times=40000):
    """Draw seeds and victims one by one, in plain Python; return the interval of the mean over seeds."""
    chooser, seeds = random.Random(0), len(cells)
    rates = [sum(right for right, _ in hits) / sum(of for _, of in hits) for hits in cells]
    mean = sum(rates) / seeds
    spread = sum((rate - mean) ** 2 for rate in rates) / (seeds - 1)

    def of_victims(hits, rate):
        picked = chooser.choices(hits, k=len(hits))
        found = sum(right for right, _ in picked) / sum(of for _, of in picked)
        return (found - rate) * math.sqrt(len(hits) / (len(hits) - 1))

    moved = [
        [of_victims(hits, rate) for hits, rate in zip(cells, rates, strict=True)]
        for _ in range(times)
    ]
    own = sum(sum(row[s] ** 2 for row in moved) / times for s in range(seeds)) / seeds
    beyond = max(spread - own, 0.0)
    scale = math.sqrt(beyond / spread * seeds / (seeds - 1)) * 2.7764 / 1.959964
    found = sorted(
        mean + sum(row) / seeds + scale * (sum(chooser.choices(rates, k=seeds)) / seeds - mean)
        for row in moved
    )
    return found[round(0.025 * times)], found[round(0.975 * times)], own / seeds + beyond / seeds


def test_interval_and_design_effect_are_those_of_brute_force():
    torch.manual_seed(4)
    cells = drawn(5, 10, spread=0.15, strength=6.0)
    low, high, variance = brute_force(cells)
    found = over_cells(cells)
    assert found.interval == pytest.approx((low, high), abs=0.015)
    alone = found.value * (1 - found.value) / (5 * 10 * TOKENS)
    assert found.design_effect == pytest.approx(variance / alone, rel=0.1)


def test_with_one_seed_it_is_the_bootstrap_over_victims():
    chooser = random.Random(0)
    hits = [(chooser.randint(0, TOKENS), TOKENS) for _ in range(20)]
    means = sorted(
        sum(right for right, _ in chooser.choices(hits, k=20)) / (20 * TOKENS) for _ in range(20000)
    )
    found = over_cells([hits])
    assert found.interval == pytest.approx((means[500], means[19500]), abs=0.02)
    assert found.note == "one seed says nothing of others"


def test_a_paired_change_is_drawn_on_both_sides():
    """Victims differ much and lose little: what is left of the difference is its own scatter."""
    chooser = random.Random(0)
    cells = []
    for _ in range(5):
        before = [(chooser.randint(2, 12), TOKENS) for _ in range(16)]
        cells.append((before, [(right - chooser.randint(0, 2), TOKENS) for right, _ in before]))
    found = paired_over_cells(cells)
    low, high = found.interval
    assert low < found.value < high < 0
    assert found.value == pytest.approx(-1 / 12, abs=0.02)
    apart = over_cells([before for before, _ in cells]).interval
    assert high - low < (apart[1] - apart[0]) / 2
    assert found.design_effect < 1  # both arms hold the same victims


def test_equal_inputs_give_equal_intervals_and_the_global_stream_stays():
    torch.manual_seed(3)
    cells = drawn(5, 8)
    before = torch.get_rng_state()
    assert over_cells(cells) == over_cells(cells)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("right", [0, TOKENS])
def test_all_or_none_right_is_an_exact_interval_over_victims(right):
    found = over_cells([[(right, TOKENS)] * 10] * 3)
    end = 0.025 ** (1 / 30)  # all of 30 victims
    assert found.interval == pytest.approx((end, 1.0) if right else (0.0, 1 - end))
    assert found.design_effect is None
    assert "exact binomial over 30 victims" in found.note
    same = over_cells([[(right, TOKENS)] * 10] * 3, same_victims=True)
    assert "exact binomial over 10 victims" in same.note


@pytest.mark.parametrize(("was", "now", "change"), [(12, 0, -1.0), (5, 5, 0.0), (0, 12, 1.0)])
def test_where_every_victim_changes_alike_the_interval_is_no_point(was, now, change):
    found = paired_over_cells([([(was, 12)] * 10, [(now, 12)] * 10)] * 2)
    end = 1 - 0.025 ** (1 / 20)
    assert found.value == change
    assert found.interval == pytest.approx((max(change - end, -1), min(change + end, 1)))


def test_little_says_little():
    assert over_cells([[(3, 12)]]).interval == (0.0, 1.0)
    assert paired_over_cells([([(3, 12)], [(1, 12)])]).interval == (-1.0, 1.0)
    assert over_cells([[(0, 0), (0, 0)]]).interval == (0.0, 1.0)
    assert over_cells([[(3, 12), (4, 12)]] * 2).note.startswith("2 seeds tell little")
    few = over_cells([[(3, 12)], [(6, 12)], [(4, 12)], [(5, 12)], [(7, 12)]])
    assert few.note.startswith("one victim with a seed")
    assert few.interval[0] < 25 / 60 < few.interval[1]


def test_what_does_not_fit_together_is_refused():
    with pytest.raises(AttackError, match="needs a seed"):
        over_cells([])
    with pytest.raises(AttackError, match="victims with each"):
        over_cells([[(1, 2)], []])
    with pytest.raises(AttackError, match=r"there are \[1, 2\] of them"):
        over_cells([[(1, 2)], [(1, 2), (1, 2)]], same_victims=True)
    with pytest.raises(AttackError, match="no pairs"):
        paired_change([grade_of([(1, 2)])], [])


def grade_of(hits):
    return Grade("a", "K1", "tokens", 0.5, (0.4, 0.6), 0.0, {}, {}, hits=hits)


def test_grades_are_pooled_by_their_hits():
    torch.manual_seed(0)
    before, after = drawn(5, 8), drawn(5, 8, mean=0.2)
    plain, defended = ([grade_of(hits) for hits in cells] for cells in (before, after))
    assert pooled_performance(plain) == over_cells(before)
    pairs = list(zip(before, after, strict=True))
    assert paired_change(plain, defended) == paired_over_cells(pairs)
    facts = pooled_performance(plain).to_dict()
    assert (facts["seeds"], facts["victims"], facts["tokens"]) == (5, 40, 480)


@pytest.mark.parametrize("freedom", [1, 2, 4, 9, 10, 11, 15, 40, 200])
def test_student_holds_95_percent(freedom):
    """The density, summed."""
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2))
    scale /= math.sqrt(freedom * math.pi)
    points = torch.linspace(0.0, student(freedom), 200001, dtype=torch.float64)
    density = scale * (1 + points**2 / freedom) ** (-(freedom + 1) / 2)
    assert 2 * float(torch.trapezoid(density, points)) == pytest.approx(0.95, abs=1e-4)
