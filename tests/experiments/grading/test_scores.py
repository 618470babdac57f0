"""Scores of a defense: the published arithmetic, types and weights, and the worst case at each preset."""

from __future__ import annotations

import pytest

from vflair_core.errors import ExperimentError
from vflair_core.experiments.grading.grades import Grade
from vflair_core.experiments.grading.scores import (
    Formula,
    Utility,
    comprehensive_score,
    dcs,
    normalised_dcs,
    scores,
    type_scores,
)

PUBLISHED = {  # (MP, AP) and DCS on three models, of arXiv 2606.14210; MP* is that without a defense
    "ADMI": [(0.516, 0.017, 0.968), (0.515, 0.014, 0.987), (0.527, 0.004, 0.984)],
    "MID": [(0.510, 0.167, 0.890), (0.497, 0.023, 0.974), (0.515, 0.290, 0.829)],
    "DualGuard": [(0.459, 0.296, 0.819), (0.510, 0.446, 0.760), (0.542, 0.572, 0.712)],
}
WITHOUT = (0.560, 0.527, 0.550)


@pytest.mark.parametrize("defense", PUBLISHED)
def test_dcs_is_what_was_published(defense):
    for (main, attack, published), best in zip(PUBLISHED[defense], WITHOUT, strict=True):
        assert dcs(attack, main, best) == pytest.approx(published, abs=1e-3)


@pytest.mark.parametrize(
    ("attack", "main", "best", "expected"), [(1.0, 0.56, 0.56, 0.586), (0.0, 0.0, 0.55, 0.720)]
)
def test_dcs_of_the_extremes_is_what_the_formula_gives(attack, main, best, expected):
    assert dcs(attack, main, best) == pytest.approx(expected, abs=1e-3)


def test_dcs_takes_what_costs_nothing_and_how_much_utility_weighs():
    assert dcs(0.3, 0.5, 0.5, ideal_attack=0.3) == 1.0
    assert dcs(0.2, 0.5, 0.5, ideal_attack=0.3) == 1.0  # better than ideal is ideal
    assert dcs(0.9, 0.5, 0.7, beta=1.0) == pytest.approx(1 / 1.2)  # only utility counts
    assert dcs(0.9, 0.5, 0.7, beta=0.0) == pytest.approx(1 / 1.9)  # only privacy does


def test_the_normalised_score_is_one_for_a_perfect_defense_and_the_same_at_every_scale():
    assert normalised_dcs(0.1, 0.1, 0.9, 0.4, 0.0, 0.4) == 1.0
    assert normalised_dcs(0.9, 0.1, 0.9, 0.4, 0.0, 0.4) == pytest.approx(dcs(1.0, 1.0, 1.0))
    small = normalised_dcs(0.5, 0.1, 0.9, 0.2, 0.0, 0.4)
    assert small == pytest.approx(normalised_dcs(0.5, 0.1, 0.9, 0.4, 0.0, 0.8))


def test_types_are_averaged_and_weighed():
    by_type = type_scores([("tokens", 0.8), ("labels", 0.5), ("tokens", 0.6)])
    assert by_type == pytest.approx({"labels": 0.5, "tokens": 0.7})
    assert comprehensive_score(by_type) == pytest.approx(0.6)  # not the mean of all three
    assert comprehensive_score(by_type, {"labels": 0.25, "tokens": 0.75}) == pytest.approx(0.65)
    assert comprehensive_score({}) is None


def test_weights_must_be_of_all_types_and_sum_to_one():
    with pytest.raises(ExperimentError, match="types of attacks that rank are tokens"):
        comprehensive_score({"tokens": 0.5}, {"labels": 1.0})
    with pytest.raises(ExperimentError, match="must sum to 1"):
        comprehensive_score({"tokens": 0.5, "labels": 0.5}, {"labels": 0.5, "tokens": 0.6})
    with pytest.raises(ExperimentError, match="none may be negative"):
        comprehensive_score({"tokens": 0.5, "labels": 0.5}, {"labels": -0.5, "tokens": 1.5})


def grade_of(name, performance, knowledge="K1", target="tokens", verdict="ok"):
    interval = (performance - 0.1, performance + 0.1)
    return Grade(name, knowledge, target, performance, interval, 0.0, {}, {}, verdict=verdict)


UTILITY = Utility(main=0.6, undefended=0.6, chance=0.1)


def test_the_worst_case_is_that_of_the_strongest_attack_of_each_preset():
    before = [
        grade_of("a", 1.0, "K1"),
        grade_of("b", 1.0, "K3"),
        grade_of("c", 1.0, "K2", "labels"),
        grade_of("d", 1.0, ("K4", "queries")),
    ]
    after = [
        grade_of("a", 0.2, "K1"),
        grade_of("b", 0.5, "K3"),
        grade_of("c", 0.1, "K2", "labels"),
        grade_of("d", 0.9, ("K4", "queries")),
    ]
    found = scores(before, after, UTILITY)
    worst = found["worst_by_preset"]
    assert worst["K0"] is None
    assert {preset: row["attack"] for preset, row in worst.items() if row} == {
        "K1": "a",
        "K2": "a",  # c leaks less
        "K3": "b",
        "K4": "b",
    }
    assert worst["K3"]["normalised"] == pytest.approx(dcs(0.5, 1.0, 1.0))
    # Whoever has answers to queries too is in the worst of all, and at no preset.
    assert found["normalised_worst"] == pytest.approx(dcs(0.9, 1.0, 1.0))
    assert found["t_dcs"]["labels"] == pytest.approx(dcs(0.1, 0.6, 0.6))
    assert found["c_dcs"] == pytest.approx(sum(found["t_dcs"].values()) / 2)


def test_it_never_rises_with_knowledge():
    """The strongest at K2 has a higher AP, of an attack that reached much more undefended."""
    before = [grade_of("low", 0.4, "K1"), grade_of("high", 1.0, "K2")]
    after = [grade_of("low", 0.4, "K1"), grade_of("high", 0.5, "K2")]
    worst = scores(before, after, UTILITY)["worst_by_preset"]
    assert worst["K2"] == worst["K1"]
    assert worst["K1"]["normalised"] == pytest.approx(dcs(1.0, 1.0, 1.0))


def test_attacks_that_fail_a_control_in_either_arm_are_in_no_mean():
    before = [grade_of("a", 1.0), grade_of("b", 1.0, verdict="negative control failed")]
    after = [grade_of("a", 0.5, verdict="positive control failed"), grade_of("b", 0.5)]
    found = scores(before, after, UTILITY)
    assert [row["normalised"] for row in found["per_attack"]] == [None, None]
    assert found["t_dcs"] == {}
    assert found["c_dcs"] is found["normalised_worst"] is None
    assert list(found["worst_by_preset"].values()) == [None] * 5


def test_one_attack_with_two_options_is_two_attacks():
    before = [grade_of("a", 1.0), grade_of("a", 1.0)]
    after = [grade_of("a", 0.8), grade_of("a", 0.3)]
    worst = scores(before, after, UTILITY)["worst_by_preset"]["K1"]
    assert worst["normalised"] == pytest.approx(dcs(0.8, 1.0, 1.0))


def test_the_constants_are_stored_beside_the_scores():
    formula = Formula(beta=0.2, ideal_attack=0.1, ideal_main=0.9, weights={"tokens": 1.0})
    found = scores([grade_of("a", 1.0)], [grade_of("a", 0.5)], UTILITY, formula)
    expected = dcs(0.5, 0.6, 0.9, ideal_attack=0.1, beta=0.2)
    assert found["per_attack"][0]["dcs"] == found["c_dcs"] == expected
    stored = [found[name] for name in ("beta", "ideal_attack", "ideal_main", "weights")]
    assert stored == [0.2, 0.1, 0.9, {"tokens": 1.0}]
