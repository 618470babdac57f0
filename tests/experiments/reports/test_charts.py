"""Figures as data and as places: which points there are, where they stand, and what lies on what."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from support.made_cells import STRONG, WEAK, cell, defended, grade, study
from vflair_core.experiments.reports.charts import (
    Chart,
    Point,
    Series,
    charts_of,
    cost_of_setting,
    leaks_of,
)
from vflair_core.experiments.reports.drawing import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    draw,
    shape,
)
from vflair_core.experiments.reports.grouping import groups_of

OTHER = {"name": "top-k", "options": {"k": 8}}


def charts(*cells):
    (group,) = groups_of(cells)
    return charts_of(group, leaks_of(group))


def chart_of(xs, ys=None, *, kind="cost", counts=False):
    points = [Point(x, y, (y, y), "A", "", "") for x, y in zip(xs, ys or [0.5] * len(xs), strict=True)]  # fmt: skip
    return Chart(kind, "", "", "", "", "", (Series("", "A", 0, tuple(points)),), 0.1, counts=counts)


def test_a_frontier_has_the_undefended_point_and_one_for_each_defense():
    frontier, *_ = charts(cell(main=0.5), cell(main=0.65, defenses=[OTHER], after=[defended(STRONG)]))  # fmt: skip
    assert [(s.letter, s.name, [(p.x, p.y) for p in s.points]) for s in frontier.series] == [
        ("U", "undefended", [(1.0, pytest.approx(0.85))]),
        ("A", "gaussian-noise (noise_multiplier = 0.3)", [(pytest.approx(0.5), pytest.approx(0.15))]),
        ("B", "top-k (k = 8)", [(pytest.approx(0.75), pytest.approx(0.85))]),
    ]  # fmt: skip


def test_seeds_make_bars_in_both_directions():
    frontier, *_ = charts(*(cell(seed=s, main=0.5 + 0.1 * s) for s in (0, 1)))
    point = frontier.series[1].points[0]
    assert point.x_range == pytest.approx((0.5, 0.4 / 0.6))
    assert point.x == pytest.approx(sum(point.x_range) / 2)
    assert point.y_range[0] <= point.y <= point.y_range[1]


def test_a_figure_for_each_knowledge_that_shows_something_else():
    both = {"before": [grade(STRONG, "a", ["K2"]), grade(STRONG, "b", ["K3"])],
            "after": [defended(WEAK, attack=name, knowledge=[k]) for name, k in (("a", "K2"), ("b", "K3"))]}  # fmt: skip
    titles = [c.title for c in charts(cell(**both)) if c.kind == "frontier"]
    assert titles == ["Utility and leakage of tokens, attacker knows K2"]


def test_leakage_by_cut_joins_the_cuts_of_each_defense():
    by_cut = [c for c in charts(*study()) if c.kind == "cut"][-1]
    assert {s.name: [p.x for p in s.points] for s in by_cut.series} == {
        "undefended": [1, 2],
        "gaussian-noise (noise_multiplier = 0.3)": [1, 2],
        "top-k (k = 8)": [1, 2],
        "permutation": [1, 2],
    }
    assert [p.letter for p in by_cut.series[1].points] == ["A1", "A2"]
    assert len(draw(by_cut).lines) == 4
    assert not [c for c in charts(cell()) if c.kind == "cut"]


def test_what_is_wrong_with_a_point_is_said_by_its_figure():
    frontiers = [c for c in charts(*study()) if c.kind == "frontier"]
    assert frontiers[0].marks == ("not evaluated",)
    assert frontiers[-1].marks == ("control failed",)
    assert all("control failed" in p.text for p in frontiers[-1].points if p.mark)


def test_where_the_undefended_model_is_at_chance_utility_is_unknown():
    lost = charts(cell(best=0.2, main=0.2, chance=0.2))
    assert {c.kind: c.marks for c in lost} == {"frontier": ("utility unknown",), "cost": ()}


def test_cost_leaves_out_attacks_and_takes_the_cell_that_did_the_work():
    did = {"total_bytes": 5_000_000, "seconds": {"preparing": 1.0, "fine-tuning": 2.0, "attacks": 50.0}}  # fmt: skip
    took = {"total_bytes": 1_000_000, "seconds": {"fine-tuning": 0.0, "attacks": 50.0}}
    cells = [
        cell(cost=took, before=[grade(STRONG, "a")], after=[defended(WEAK, attack="a")]),
        cell(cost=did, before=[grade(STRONG, "b")], after=[defended(WEAK, attack="b")]),
    ]
    (group,) = groups_of(cells)
    assert cost_of_setting(group.settings[0]) == (5.0, 3.0)
    by_bytes, by_seconds = (c for c in charts(*cells) if c.kind == "cost")
    assert [p.x for p in by_bytes.points] == [5.0, 5.0]
    assert [p.x for p in by_seconds.points] == [3.0, 3.0]


def test_places_are_proportional_and_the_floor_is_where_it_says():
    drawing = draw(chart_of([0.0, 0.5, 1.0], [0.0, 0.5, 1.0], kind="frontier"))
    a, b, c = drawing.dots
    assert b.x - a.x == pytest.approx(c.x - b.x, abs=0.2)
    assert (a.y, c.y) == (HEIGHT - BOTTOM, TOP)
    assert b.y == pytest.approx((a.y + c.y) / 2)
    assert drawing.floor_at == pytest.approx(a.y + 0.1 * (c.y - a.y), abs=0.1)


def test_costs_that_are_far_apart_stand_on_a_logarithmic_axis():
    drawing = draw(chart_of([1.0, 10.0, 100.0]))
    a, b, c = drawing.dots
    assert b.x - a.x == pytest.approx(c.x - b.x, abs=0.2)
    assert {"1", "10", "100"} <= {word for _, word in drawing.x.shown}
    near = draw(chart_of([10.0, 20.0, 40.0]))
    assert near.x.at(20.0) - near.x.at(10.0) == pytest.approx((near.x.at(40.0) - near.x.at(20.0)) / 2, abs=0.2)  # fmt: skip


@settings(deadline=None)
@given(
    xs=st.lists(st.floats(0, 1e6), min_size=1, max_size=30),
    kind=st.sampled_from(["frontier", "cost"]),
)
@example(xs=[1.0, 1e-101, 1e5], kind="cost")
@example(xs=[0.0], kind="cost")
@example(xs=[5e-324, 1e-320], kind="cost")
def test_every_point_and_tick_is_inside_and_ticks_are_few(xs, kind):
    drawing = draw(chart_of(xs, kind=kind))
    places = [dot.x for dot in drawing.dots] + [at for at, _ in drawing.x.shown]
    assert all(LEFT - 1 <= at <= WIDTH - RIGHT + 1 for at in places)
    assert 1 <= len(drawing.x.ticks) <= 10


@settings(deadline=None)
@given(heads=st.lists(st.integers(0, 80), min_size=1, max_size=8, unique=True))
def test_cuts_are_counted_with_whole_ticks(heads):
    drawing = draw(chart_of([float(h) for h in heads], counts=True))
    assert all(tick == int(tick) for tick in drawing.x.ticks)
    assert 1 <= len(drawing.x.ticks) <= 12


def test_letters_lie_on_no_point_and_on_no_other_letter_where_there_is_room():
    xs = [0.2, 0.25, 0.3, 0.6, 0.6, 0.9]
    ys = [0.5, 0.5, 0.5, 0.2, 0.24, 0.99]
    drawing = draw(chart_of(xs, ys, kind="frontier"))
    letters = [dot.letter_at for dot in drawing.dots]
    for (x, y), dot in itertools.product(letters, drawing.dots):
        assert math.hypot(x - dot.x, y - 4 - dot.y) > 7
    for (a, b), (c, d) in itertools.combinations(letters, 2):
        assert abs(a - c) > 8 or abs(b - d) > 9


def test_shapes_are_told_apart_without_colour():
    assert len({shape(number, 0, 0) for number in range(-1, 8)}) == 9


def test_there_is_a_letter_for_any_number_of_defenses():
    cells = [cell(defenses=[{"name": "noise", "options": {"x": n}}]) for n in range(30)]
    frontier, *_ = charts(*cells)
    letters = [s.letter for s in frontier.series]
    assert len(set(letters)) == len(letters) == 31
    assert letters[:3] == ["U", "A", "B"]
    assert [p.letter for s in frontier.series for p in s.points] == letters
