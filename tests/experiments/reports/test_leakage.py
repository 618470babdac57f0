"""What the strongest attack is said to recover: over seeds, with its interval, and with what is wrong with it."""

from __future__ import annotations

import numpy as np
import pytest

from support.made_cells import STRONG, WEAK, cell, defended, grade
from vflair_core.errors import AttackError
from vflair_core.experiments.grading.pooling import pooled_performance
from vflair_core.experiments.grading.statistics import interval
from vflair_core.experiments.reports.concerns import unanswered, without_baseline
from vflair_core.experiments.reports.grouping import groups_of
from vflair_core.experiments.reports.intervals import change_over_seeds, interval_over_seeds
from vflair_core.experiments.reports.leakage import knowledge_of, leak_of

FAILED = "negative control failed: 0.900 on other examples' messages"


def leak(cells, arm="defended", knowledge="K4", target="tokens"):
    (group,) = groups_of(cells)
    (setting,) = group.settings
    return leak_of(setting, arm, knowledge, target)


def test_it_is_the_strongest_attack_of_the_result_averaged_over_seeds():
    cells = [
        cell(seed=seed, before=[grade(STRONG, "a"), grade(WEAK, "b")],
             after=[defended(WEAK, attack="a"), defended([(n, 10)] * 4, attack="b")])
        for seed, n in ((0, 4), (1, 6))
    ]  # fmt: skip
    found = leak(cells)
    rows = [c.result.numbers["defended"]["strongest"][-1] for c in cells]
    assert found.attack_performance == sum(r["attack_performance"] for r in rows) / 2 == 0.5
    assert found.attacks == ("b (K4)",)
    assert found.mark == ""


def test_one_seed_has_the_interval_of_its_grade():
    assert leak([cell()]).interval == defended(WEAK).interval


def test_several_seeds_have_the_interval_of_seeds_and_victims_of_the_same_texts():
    rng = np.random.default_rng(0)
    hits = rng.integers(0, 11, (3, 30))
    grades = [grade([(int(h), 10) for h in each]) for each in hits]
    low, high = interval_over_seeds(grades)
    assert (low, high) == pooled_performance(grades, same_victims=True).interval
    assert low < hits.mean() / 10 < high


def test_where_all_is_right_the_interval_is_the_exact_binomial_one_over_all_victims():
    sure = [grade([(5, 5)] * 4), grade([(5, 5)] * 6)]
    assert interval_over_seeds(sure) == pytest.approx((0.025 ** (1 / 10), 1.0))


def test_without_hits_the_intervals_of_the_seeds_are_joined():
    without = [grade(WEAK), grade(STRONG)]
    for each in without:
        each.hits = []
    assert interval_over_seeds(without) == (interval(WEAK)[0], interval(STRONG)[1])


def test_a_change_is_paired_and_needs_seeds_and_hits():
    before, after = [grade(STRONG), grade(STRONG)], [grade(WEAK), grade(WEAK)]
    low, high = change_over_seeds(before, after)
    assert low <= 0.15 - 0.85 <= high < 0
    assert change_over_seeds(before[:1], after[:1]) is None
    every, none = [grade([(5, 5)] * 4)] * 2, [grade([(0, 5)] * 4)] * 2
    low, high = change_over_seeds(every, none)
    assert (low, high < 0) == (-1.0, True)
    assert change_over_seeds(every, after) is not None
    assert change_over_seeds(before, [grade(WEAK[:2]), grade(WEAK)]) is None
    with pytest.raises(ValueError, match="shorter"):
        change_over_seeds(before, after[:1])


def test_a_stronger_attack_that_failed_a_control_marks_the_point():
    both = {"before": [grade(STRONG, "a"), grade(WEAK, "b")]}
    sound, wrong = defended(WEAK, attack="a"), defended(STRONG, attack="b", verdict=FAILED)
    found = leak([cell(**both, after=[sound, wrong])])
    assert (found.mark, found.attacks) == ("control failed", ("a (K4)",))
    weaker = defended([(0, 10)] * 4, attack="b", verdict=FAILED)
    assert leak([cell(**both, after=[sound, weaker])]).mark == ""


def test_an_attack_that_is_stronger_without_a_defense_and_failed_a_control_marks_the_point():
    both = {"before": [grade(WEAK, "a"), grade(STRONG, "b")]}
    idle = defended([(0, 10)] * 4, attack="b", verdict=FAILED)
    found = leak([cell(**both, after=[defended(WEAK, attack="a"), idle])])
    assert (found.mark, found.attacks) == ("control failed", ("a (K4)",))


def test_of_attacks_that_all_failed_the_most_is_shown_and_marked():
    found = leak([cell(after=[defended(WEAK, verdict=FAILED)])])
    assert (found.attack_performance, found.mark) == (pytest.approx(0.15), "control failed")


def test_one_seed_that_failed_marks_all():
    cells = [cell(), cell(seed=1, after=[defended(WEAK, verdict=FAILED)])]
    assert leak(cells).mark == "control failed"


def test_a_defense_that_no_attack_took_into_account_is_marked():
    assert leak([cell(after=[defended(WEAK, adaptive=False)])]).mark == "not evaluated"
    assert leak([cell(after=[defended(WEAK, adaptive=False)])], "undefended").mark == ""


def test_an_attack_at_its_floor_without_a_defense_is_marked():
    idle = grade(WEAK, verdict="attack uninformative: it is at the floor without a defense")
    assert leak([cell(before=[idle], defenses=[])], "undefended").mark == "uninformative"


def test_who_knows_too_little_for_every_attack_leaks_nothing():
    assert leak([cell()], knowledge="K1") is None
    assert leak([cell()], target="labels") is None


def test_knowledge_is_named_where_it_lets_another_set_of_attacks_in():
    each = [grade(WEAK, "a", known) for known in (["K1"], ["K4"], ["K1", "queries"], ["smashed"])]
    assert knowledge_of(each) == ("K0", "K1", "K4", "K1 + queries", "K4 + queries")
    with pytest.raises(AttackError):
        knowledge_of([grade(WEAK, "a", ["everything"])])


def linear(hits, **other):
    return defended(hits, attack="linear-inverter", knowledge=("K1", "queries"), **other)


def with_baseline(seed, *rates):
    """A cell with searches at K4, beside linear maps that recover these rates."""
    maps = [linear([(rate, 10)] * 4) for rate in rates]
    before = [grade(STRONG), *(grade(STRONG, "linear-inverter", ("K1", "queries")) for _ in maps)]
    return cell(seed=seed, before=before, after=[defended(STRONG), *maps])


def test_the_linear_map_stands_beside_whatever_is_stronger():
    found = leak([with_baseline(0, 2, 4), with_baseline(1, 6)])
    assert found.attacks == ("vocabulary-search (K4)",)
    assert found.baseline == pytest.approx((0.4 + 0.6) / 2)


def test_a_seed_without_the_linear_map_leaves_no_baseline_and_is_named():
    cells = [with_baseline(0, 4), with_baseline(1)]
    assert leak(cells).baseline is None
    ((group, names),) = without_baseline(groups_of(cells))
    assert "words" in group
    assert names == ["gaussian-noise (noise_multiplier = 0.3)"]
    assert without_baseline(groups_of(cells[:1])) == []


def test_who_reads_labels_only_owes_no_linear_map():
    labels = [grade(STRONG, target="labels")]
    told = cell(before=labels, after=[defended(WEAK, target="labels")])
    assert without_baseline(groups_of([told])) == []


def test_an_attack_whose_budget_ended_is_named_in_every_arm_and_a_shared_arm_once():
    stopped = grade(WEAK, unanswered=0.8)
    cells = [cell(before=[stopped], after=[defended(WEAK, unanswered=0.5)]) for _ in range(2)]
    found = unanswered(groups_of([*cells, cell(seed=1)]))
    assert [(each.arm, each.attack, each.share) for each in found] == [
        ("undefended", "vocabulary-search (K4)", 0.8),
        ("defended", "vocabulary-search (K4)", 0.5),
    ]
