"""Who is ranked, by what, and who is not."""

from __future__ import annotations

import math

import attrs
import pytest

from support.made_cells import NOISE, STRONG, WEAK, cell, defended, grade, study
from vflair_core.experiments.reports.concerns import failed_controls, unread_seams
from vflair_core.experiments.reports.grouping import groups_of
from vflair_core.experiments.reports.standings import standings_of

OTHER = {"name": "top-k", "options": {"k": 8}}


def standings(*cells):
    return standings_of(groups_of(cells))


def by_hand(leaked, kept):
    """The chance-normalised score: DCS with beta 1/2 of what leaks and what is lost."""
    return 1 / (1 + math.sqrt(0.5 * leaked**2 + 0.5 * (1 - kept) ** 2))


def test_the_score_is_that_of_the_worst_attack_by_hand():
    made = cell(
        before=[grade(STRONG, "a", floor=0.05), grade([(5, 10)] * 4, "b", floor=0.1)],
        after=[defended(WEAK, attack="a"), defended([(4, 10)] * 4, attack="b")],
        best=0.8, main=0.5, chance=0.2,
    )  # fmt: skip
    ((row,), unranked) = standings(made)
    assert unranked == []
    assert row.score == pytest.approx(by_hand((0.4 - 0.1) / (0.5 - 0.1), 0.5))
    assert row.attack == "b (K4)"
    assert (row.undefended, row.defended, row.floor) == pytest.approx((0.5, 0.4, 0.1))


def test_scores_are_means_over_seeds_of_the_same_attack():
    cells = [cell(seed=s, after=[defended([(n, 10)] * 4)]) for s, n in ((0, 2), (1, 6))]
    ((row,), _) = standings(*cells)
    each = [by_hand((n / 10 - 0.05) / 0.8, 0.4 / 0.6) for n in (2, 6)]
    assert row.score == pytest.approx(sum(each) / 2)
    assert row.score_range == pytest.approx((min(each), max(each)))
    assert row.change is not None


def test_better_scores_come_first_and_equal_ones_share_a_rank():
    strong = cell(after=[defended(STRONG)])
    weak = cell(defenses=[OTHER])
    twin = cell(defenses=[{"name": "permutation"}])
    rows, _ = standings(strong, weak, twin)
    assert [(r.rank, r.setting.experiment.defenses[0].name) for r in rows] == [
        (1, "top-k"), (1, "permutation"), (3, "gaussian-noise"),
    ]  # fmt: skip


def test_ranks_are_within_one_model_task_cut_and_knowledge():
    near = {"before": [grade(STRONG), grade(STRONG, "n", ["K1"])],
            "after": [defended(WEAK), defended(WEAK, attack="n", knowledge=["K1"])]}  # fmt: skip
    rows, _ = standings(cell(**near), cell(tail=0))
    assert [(r.group.cut, r.knowledge, r.rank) for r in rows] == [
        ("HBT", "K1", 1), ("HBT", "K4", 1), ("HT", "K4", 1),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("before", "after", "why"),
    [
        (grade(STRONG), defended(WEAK, positive=None), "no positive control"),
        (grade(STRONG), defended(WEAK, negative=None), "no negative control"),
        (grade(STRONG, negative=None), defended(WEAK), "no negative control"),
        (grade(STRONG), defended(WEAK, verdict="positive control failed: 0.1"), "positive control failed"),
        (grade(STRONG, verdict="negative control failed: 0.9"), defended(WEAK), "negative control failed"),
        (grade(STRONG, verdict="attack uninformative"), defended(WEAK), "uninformative"),
    ],
)  # fmt: skip
def test_a_defense_without_both_controls_and_its_reference_is_not_ranked(before, after, why):
    ranked, (row,) = standings(cell(before=[before], after=[after]))
    assert ranked == []
    assert why in row.reason
    assert row.knowledge == "K4"


def test_one_seed_without_a_control_is_enough_to_keep_an_attack_out():
    ranked, unranked = standings(cell(), cell(seed=1, after=[defended(WEAK, positive=None)]))
    assert (ranked, len(unranked)) == ([], 1)


def test_a_defense_that_nothing_attacked_is_not_ranked():
    ranked, (row,) = standings(cell(before=[], after=[]))
    assert (ranked, row.reason) == ([], "no attack ran")


def test_an_attack_that_is_left_out_and_a_defense_not_evaluated_stand_beside_the_score():
    both = cell(
        before=[grade(STRONG, "a"), grade(WEAK, "b")],
        after=[defended(WEAK, attack="a", adaptive=False),
               defended(WEAK, attack="b", verdict="positive control failed: 0.1", adaptive=False)],
    )  # fmt: skip
    ((row,), _) = standings(both)
    assert row.attack == "a (K4)"
    assert row.marks == (
        "control failed: b (K4) is left out",
        "not evaluated: no attack took the defense into account",
    )


def test_without_the_attack_that_finds_most_undefended_there_is_no_worst_case():
    wrong = defended([(0, 10)] * 4, attack="b", verdict="positive control failed: 0.1")
    both = cell(before=[grade(WEAK, "a"), grade(STRONG, "b")], after=[defended(WEAK, attack="a"), wrong])  # fmt: skip
    ranked, (row,) = standings(both)
    assert ranked == []
    assert (
        row.reason == "b (K4): positive control failed: 0.1; without a defense no attack finds more"
    )


def test_a_model_that_learns_nothing_leaves_utility_unknown():
    ((row,), _) = standings(cell(best=0.2, main=0.2, chance=0.2))
    assert "utility unknown: the undefended model is at chance" in row.marks


def test_every_control_that_failed_is_told_and_a_shared_arm_once():
    wrong = grade(STRONG, verdict="negative control failed: 0.9")
    cells = [cell(before=[wrong]), cell(before=[wrong], defenses=[OTHER])]
    told = failed_controls(groups_of(cells))
    assert [(c.arm, c.attack) for c in told] == [("undefended", "vocabulary-search (K4)")]
    told = failed_controls(groups_of(study()))
    assert {(c.setting.defense, c.arm) for c in told} == {("permutation", "defended")}
    assert len(told) == 4  # two seeds at two cuts


def seam(name, crossed, *read_by, covered_by=()):
    """A row of a result's seams."""
    covers = [{"defense": defense, "covers": ["prompt"]} for defense in covered_by]
    readers = [{"attack": attack, "knowledge": "K4", "verdict": "ok"} for attack in read_by]
    return {"seam": name, "crossed": crossed, "covered_by": covers, "read_by": readers}


def test_a_seam_that_no_attack_read_is_told_and_unknown_seams_are_unknown():
    seams = [seam("smashed", 4, "a"), seam("lengths", 4, covered_by=["x"]), seam("caches", 0)]
    told = unread_seams(groups_of([cell(seams=seams)]))
    assert [(s.seam, s.arm, s.covered_by) for s in told] == [
        ("lengths", "undefended", ("x",)),
        ("lengths", "defended", ("x",)),
    ]
    assert unread_seams(groups_of([cell(seams=seams[:1])])) == []
    assert unread_seams(groups_of([cell()])) is None


def test_a_seam_that_another_cell_of_the_setting_read_was_read():
    def seen(attack, *read_by):
        made = {"before": [grade(STRONG, attack)], "after": [defended(WEAK, attack=attack)]}
        return cell(**made, seams=[seam("lengths", 4, *read_by)])

    assert unread_seams(groups_of([seen("a"), seen("b", "b")])) == []
    assert len(unread_seams(groups_of([seen("a")]))) == 2


def test_attacks_whose_grades_are_missing_are_read_from_the_numbers():
    whole = cell()
    kept = attrs.evolve(whole, grades={})
    ((a,), _), ((b,), _) = standings(whole), standings(kept)
    assert (a.score, a.defended, a.interval) == (b.score, b.defended, b.interval)
    assert NOISE["name"] in a.setting.name


def test_an_attack_that_one_seed_lacks_ranks_nothing_and_the_others_do():
    both = cell(before=[grade(STRONG, "a"), grade(STRONG, "b")],
                after=[defended(WEAK, attack="a"), defended(WEAK, attack="b")])  # fmt: skip
    one = cell(seed=1, before=[grade(STRONG, "b")], after=[defended(WEAK, attack="b")])
    ranked, unranked = standings_of(groups_of([both, one]))
    assert not unranked or all("every seed" in row.reason for row in unranked)
    assert [row.attack for row in ranked] in (["b (K4)"], [])
    assert ranked or unranked
