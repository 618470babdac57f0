"""A study file: the product of its axes, what each cell is, and errors that say which cell is wrong."""

from __future__ import annotations

import pytest

from vflair_core.errors import ExperimentError
from vflair_core.experiments.config import experiment_from
from vflair_core.experiments.studies.grid import grid_from, labelled, read_grid

EXPERIMENT = {"task": {"name": "words"}, "model": {"name": "m"}, "train": {"steps": 3}}
NOISE = {"label": "noise", "defenses": [{"name": "gaussian-noise"}]}
KNOB = {"option": "noise_multiplier", "weak": 1e-3, "strong": 1}
GRID = {
    "experiment": EXPERIMENT,
    "axes": {"defense": [{"label": "none"}, NOISE]},
    "vary": {"seed": [0, 1], "partition": {"head": [1, 2]}},
}


def test_each_value_of_an_axis_meets_each_of_the_others():
    plans = grid_from(GRID)
    assert len(plans) == 8
    assert [tuple(plan.labels.values()) for plan in plans[:3]] == [
        ("none", "0", "1"), ("none", "0", "2"), ("none", "1", "1"),
    ]  # fmt: skip
    last = plans[-1]
    assert last.labels == {"defense": "noise", "seed": "1", "partition.head": "2"}
    assert (last.experiment.seed, last.experiment.partition.head) == (1, 2)
    assert [spec.name for spec in last.experiment.defenses] == ["gaussian-noise"]


def test_a_part_of_an_experiment_is_merged_into_what_all_share_and_lists_are_replaced():
    table = EXPERIMENT | {"attacks": [{"name": "a"}]}
    cell = {"train": {"batch_size": 2}, "attacks": [{"name": "b"}, {"name": "c"}]}
    (plan,) = grid_from({"experiment": table, "cells": [cell]})
    assert (plan.experiment.train.steps, plan.experiment.train.batch_size) == (3, 2)
    assert [spec.name for spec in plan.experiment.attacks] == ["b", "c"]
    assert plan.labels == {"cell": "1"}


def test_values_that_are_things_are_labelled_by_their_names():
    table = {
        "experiment": EXPERIMENT,
        "vary": {"defenses": [[], [{"name": "top-k", "options": {"k": 3}}, {"name": "mid"}]], "wire": [True]},
    }  # fmt: skip
    labels = [plan.labels["defenses"] for plan in grid_from(table)]
    assert labels == ["none", "top-k (k 3) + mid"]
    assert grid_from(table)[0].labels["wire"] == "true"


def test_what_is_left_out_is_left_out():
    without = [{"defense": "noise", "seed": [1]}, {"partition.head": 2, "defense": "none"}]
    plans = grid_from(GRID | {"without": without})
    assert [tuple(plan.labels.values()) for plan in plans] == [
        ("none", "0", "1"), ("none", "1", "1"), ("noise", "0", "1"), ("noise", "0", "2"),
    ]  # fmt: skip


def test_a_cell_is_tuned_once_for_each_share_of_utility():
    axes = {"defense": [{"label": "none"}, NOISE | {"knob": KNOB}]}
    plans = grid_from(
        {"experiment": EXPERIMENT, "axes": axes, "tune": {"keep": [0.9, 0.5], "trials": 4}}
    )
    assert [(p.labels, p.knob is None, p.keep, p.trials) for p in plans[1:]] == [
        ({"defense": "noise", "keep": "0.9"}, False, 0.9, 4),
        ({"defense": "noise", "keep": "0.5"}, False, 0.5, 4),
    ]
    assert plans[0].knob is None


def test_experiments_are_labelled_by_the_keys_in_which_they_differ():
    each = [EXPERIMENT | {"seed": n, "train": {"steps": s}} for n, s in ((0, 3), (1, 3), (1, 4))]
    plans = labelled([experiment_from(table) for table in each])
    assert [plan.labels for plan in plans] == [
        {"seed": "0", "train.steps": "3"},
        {"seed": "1", "train.steps": "3"},
        {"seed": "1", "train.steps": "4"},
    ]


def test_a_file_may_share_the_experiment_of_another_and_be_overridden(tmp_path):
    (tmp_path / "one.toml").write_text('task.name = "words"\nmodel.name = "m"\ntrain.steps = 3\n')
    (tmp_path / "grid.toml").write_text('base = "one.toml"\nvary.seed = [1, 2]\n')
    plans = read_grid(tmp_path / "grid.toml", ["experiment.train.steps=9", "vary.seed=[5]"])
    assert [(p.experiment.seed, p.experiment.train.steps) for p in plans] == [(5, 9)]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"axis": {}}, "A study has no 'axis'.*axes"),
        ({"vary": {"seed": 3}}, "vary.seed = 3: give a list"),
        ({"vary": {"sede": [3]}}, r"(?s)defense = none, sede = 3: .*no such key.*seed"),
        ({"vary": {"seed": [1, 1]}}, "axis seed has the label '1' twice"),
        ({"vary": {"seed": []}}, "axis seed has no value"),
        ({"vary": {"defense": [1]}}, "'defense' is an axis twice"),
        ({"axes": {"defense": {"label": "none"}}}, r"write \[\[axes.defense\]\] for each"),
        ({"axes": 3}, "(?s)axes: expected a table of keys, got 3"),
        ({"experiment": 3}, "(?s)experiment: expected a table of keys, got 3"),
        ({"without": 3}, "(?s)without: expected a list"),
        ({"cells": [3]}, "(?s)cells.0: expected a table of keys, got 3"),
        ({"cells": [{"label": "a"}, {"label": "a"}]}, "the label 'a' twice"),
        ({"axes": {"d": [{"knob": 3}]}}, "is 3: give a table of keys"),
        (
            {"vary": {"defenses": [[{"name": "a", "options": 3}]]}, "axes": {}},
            "(?s)expected a table of keys, got 3",
        ),
        ({"without": [{"defense": "noise "}]}, "names defense = 'noise '.*noise"),
        ({"without": [{}]}, "names no axis"),
        ({"without": [{"defense": ["none", "noise"]}]}, "leaves out all"),
        (
            {"vary": {"defenses": [[]]}},
            "defenses is set by the axis defense and by the axis defenses",
        ),
        ({"tune": {"trials": 4}}, "no cell has a knob"),
        ({"tune": {"keep": [0.9, 0.9]}}, "(?s)give each share once"),
        ({"tune": {"keep": [0.9, 0.5]}, "vary": {"keep": [1]}}, "call yours something else"),
        ({"axes": {"defense": [{"label": "x", "nois": 1}]}}, r"(?s)defense = x.*no such key"),
        ({"without": [{"defens": "none"}]}, r"names the axis 'defens'.*defense"),
        ({"tune": {"keep": [2.0]}}, r"give shares in \(0, 1\]"),
        ({"tune": {"trials": 1}}, "(?s)trials.*>= 2"),
        ({"vary": {"seeds": [[0, 1, 2, 3, 4]]}}, "each seed is a cell of its own"),
        ({"vary": {"save": [True]}}, "a study keeps what attacks need"),
        ({"axes": {"d": [{"knob": KNOB}]}}, "has 0 defenses"),
        ({"axes": {"d": [NOISE | {"knob": KNOB | {"weak": 0.0}}]}}, "has no logarithm"),
        ({"axes": {"d": [NOISE | {"knob": KNOB | {"scale": "lin"}}]}}, "(?s)no 'lin'.*linear"),
        ({"axes": {"d": [NOISE | {"knob": KNOB | {"defense": -1}}]}}, "(?s)must be >= 0"),
        ({"axes": {"d": [NOISE | {"knob": {"option": "a"}}]}}, "(?s)weak: this key is needed"),
        (
            {"axes": {"d": [NOISE | {"knob": KNOB}], "e": [{"knob": KNOB}]}},
            "2 knobs: a cell is tuned by one",
        ),
    ],
)
def test_what_is_wrong_is_told_with_the_cell(changes, told):
    with pytest.raises(ExperimentError, match=told):
        grid_from(GRID | changes)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ExperimentError, match="cannot be read: No such file"):
        read_grid(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("a = ")
    with pytest.raises(ExperimentError, match="is not TOML"):
        read_grid(tmp_path / "bad.toml")
    (tmp_path / "lost.toml").write_text('base = "x.toml"')
    with pytest.raises(ExperimentError, match=r"x\.toml cannot be read"):
        read_grid(tmp_path / "lost.toml")
