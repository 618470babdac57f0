"""Which cells a report puts together, and what it then says of them."""

from __future__ import annotations

import attrs
import pytest

from support.made_cells import NOISE, STRONG, WEAK, cell, defended, failed, grade, not_run
from vflair_core.experiments.reports.grouping import groups_of, why_unread
from vflair_core.experiments.reports.settings import grades_of


def only(cells):
    (group,) = groups_of(cells)
    return group


def test_seeds_of_one_experiment_are_one_setting():
    group = only([cell(seed=1), cell(seed=0), cell(seed=0, head=2)])
    assert [(s.name, [t.seed for t in s.trials]) for s in group.settings] == [
        ("gaussian-noise (noise_multiplier = 0.3), head 1", [0, 1]),
        ("gaussian-noise (noise_multiplier = 0.3), head 2", [0]),
    ]


def test_models_tasks_and_kinds_of_cut_are_apart():
    cells = [cell(), cell(tail=0), cell(task={"name": "other"}), cell(model={"name": "a/model"})]
    assert [(g.model, g.task, g.cut) for g in groups_of(cells)] == [
        ("llama, random", "words", "HBT"),
        ("llama, random", "words", "HT"),
        ("llama, random", "other", "HBT"),
        ("a/model", "words", "HBT"),
    ]


def test_two_models_that_would_be_called_the_same_are_not():
    small = {"config": {"model_type": "llama", "hidden_size": 8}}
    names = [group.model for group in groups_of([cell(), cell(model=small)])]
    assert len(set(names)) == 2
    assert all(name.startswith("llama, random (") for name in names)


def test_cells_that_differ_in_their_attacks_are_one_trial():
    a, b = grade(WEAK, "a"), grade(STRONG, "b")
    apart = [
        cell(before=[a], after=[defended(WEAK, attack="a")]),
        cell(before=[b], after=[defended(STRONG, attack="b")]),
    ]
    (setting,) = only(apart).settings
    (trial,) = setting.trials
    assert [g.attack for g in trial.grades["defended"]] == ["a", "b"]
    together = cell(before=[a, b], after=[defended(WEAK, attack="a"), defended(STRONG, attack="b")])
    rows = together.result.numbers["dcs"]["per_attack"]
    assert trial.scores == tuple(row["normalised"] for row in rows)


def test_an_undefended_cell_and_the_undefended_arms_of_others_are_one_reference():
    cells = [cell(defenses=[]), cell(), cell(defenses=[{"name": "top-k"}]), cell(head=2)]
    group = only(cells)
    assert [(r.name, len(r.cells)) for r in group.references] == [
        ("undefended, head 1", 1),
        ("undefended, head 2", 1),
    ]
    assert group.references[0].cells[0].key == cells[0].key


def test_a_tuned_defense_is_one_setting_whatever_was_found_for_a_seed():
    def tuned(seed, value, keep):
        facts = {"option": "noise_multiplier", "value": value, "keep": keep, "target": 0.7, "chance": 0.2, "trials": []}  # fmt: skip
        made = cell(seed=seed, defenses=[{**NOISE, "options": {"noise_multiplier": value}}])
        return attrs.evolve(made, tuned=facts)

    group = only([tuned(0, 0.1, 0.9), tuned(1, 0.2, 0.9), tuned(0, 0.4, 0.8), cell()])
    assert [(s.name, len(s.trials)) for s in group.settings] == [
        ("gaussian-noise, tuned to keep 90%", 2),
        ("gaussian-noise, tuned to keep 80%", 1),
        ("gaussian-noise (noise_multiplier = 0.3)", 1),
    ]


def test_labels_of_the_grid_name_settings_where_they_tell_them_apart():
    labels = [{"defense": "noise", "fine-tuning": how, "wire": "yes", "seed": "0"} for how in ("full", "lora")]  # fmt: skip
    steps = ({"steps": 6}, {"steps": 7})
    cells = [cell(labels=each, train=train) for each, train in zip(labels, steps, strict=True)]
    assert [s.name for s in only(cells).settings] == ["noise, fine-tuning full", "noise, fine-tuning lora"]  # fmt: skip


def test_axes_named_by_their_keys_are_told_by_what_they_set():
    labels = [{"seed": "0", "defenses": f"noise {n}", "task.name": "words", "partition.head": str(n)} for n in (1, 2)]  # fmt: skip
    cells = [cell(head=n, labels=labels[n - 1]) for n in (1, 2)]
    assert [s.name for s in only(cells).settings] == [
        "gaussian-noise (noise_multiplier = 0.3), partition.head 1",
        "gaussian-noise (noise_multiplier = 0.3), partition.head 2",
    ]


def test_utility_is_the_share_of_the_undefended_above_chance():
    (setting,) = only([cell(best=0.8, main=0.5, chance=0.2)]).settings
    assert setting.trials[0].utility == pytest.approx(0.3 / 0.6)


def test_a_reference_has_all_utility():
    (reference,) = only([cell()]).references
    assert reference.trials[0].utility == 1.0


def test_grades_made_of_numbers_are_those_that_ran_without_their_hits():
    ran = cell(before=[grade(STRONG, knowledge=["K1", "queries"])])
    kept = attrs.evolve(ran, grades={})
    (anew,) = grades_of(kept, "undefended")
    (original,) = grades_of(ran, "undefended")
    assert anew.hits == []
    assert anew == attrs.evolve(original, hits=[])


@pytest.mark.parametrize(
    ("odd", "why"),
    [
        (failed("it broke"), "failed"),
        (not_run(), "not run"),
        (attrs.evolve(cell(), result=attrs.evolve(cell().result, finished=False)), "not finished"),
        (attrs.evolve(cell(), result=attrs.evolve(cell().result, numbers={})), "no undefended reference"),
        (attrs.evolve(cell(defenses=[]), experiment=cell().experiment), "no defended arm"),
        (attrs.evolve(cell(), experiment=attrs.evolve(cell().experiment, seeds=range(5))), "axis of seeds"),
    ],
)  # fmt: skip
def test_a_cell_that_cannot_stand_beside_others_says_why(odd, why):
    assert why in why_unread(odd)
    assert groups_of([odd]) == ()
