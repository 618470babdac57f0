"""A study file: what all cells share, the axes whose product they are, and what is tuned.

[experiment]                     # as in the file of one experiment; or base = "experiment.toml" beside the grid
[vary]                           # each list is an axis: every value with every other
seed = [0, 1, 2]
partition.head = [1, 2]
[[axes.defense]]                 # an axis of parts of experiments, with labels
label = "none"
[[axes.defense]]
label = "dp-forward"
defenses = [{ name = "dp-forward" }]
knob = { option = "epsilon", weak = 1e6, strong = 8 }
"""

from __future__ import annotations

import itertools
import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import field, frozen

from vflair_core.errors import ExperimentError, alternatives
from vflair_core.experiments.config import experiment_from, override, structured
from vflair_core.experiments.experiment import Experiment
from vflair_core.experiments.studies.axes import (
    Entry,
    check_axes,
    checked,
    entries_of,
    entry_of,
    flat,
    label_of,
    labels_of,
    left_out,
    lists_in,
    values_of,
)
from vflair_core.experiments.studies.tuning import Knob, Tune

KEYS = ("base", "experiment", "vary", "axes", "cells", "without", "tune")


@frozen
class Plan:
    """One cell as the grid describes it: its labels, its experiment, and what is tuned in it, if anything.

    Attributes:
        labels: What it is on each axis.
        experiment: What is run.
        knob: The option that is tuned first.
        keep: Share of the undefended main performance above chance that the tuned setting must keep.
        trials: Trainings to find it.
    """

    labels: Mapping[str, str]
    experiment: Experiment
    knob: Knob | None = None
    keep: float = 0.9
    trials: int = 6

    def __attrs_post_init__(self) -> None:
        e, name = self.experiment, self.name
        if e.seeds:
            raise ExperimentError(
                f"{name} has seeds = {list(e.seeds)}: in a study each seed is a cell of its own. Write seed = {list(e.seeds)} "
                "under [vary]."
            )
        if e.save:
            raise ExperimentError(
                f"{name} has save = true: a study keeps what attacks need, not checkpoints. Leave it out, and run the cell "
                "that you want with `vflair run`."
            )
        if self.knob is not None:
            self.knob.check(e, name)

    @property
    def name(self) -> str:
        """The cell in words."""
        return _named(self.labels)


@frozen
class _File:
    """What a study file says."""

    experiment: Mapping[str, Any] = field(factory=dict)
    vary: Mapping[str, Any] = field(factory=dict)
    axes: Mapping[str, Any] = field(factory=dict)
    cells: tuple[Mapping[str, Any], ...] = ()
    without: tuple[Mapping[str, Any], ...] = ()
    tune: Mapping[str, Any] = field(factory=dict)


def read_grid(path: str | Path, overrides: Iterable[str] = ()) -> list[Plan]:
    """Read a study file; `overrides` are ``"experiment.train.steps=10"``, values in TOML.

    Raises:
        ExperimentError: The file does not exist, is not TOML, or describes no study or a cell that is no experiment.
    """
    path = Path(path)
    table = _read(path)
    for each in overrides:
        override(table, each)
    if "base" in table:
        base = _read(path.parent / str(table.pop("base")))
        table["experiment"] = _merged(base, table.get("experiment", {}))
    return grid_from(table)


def grid_from(table: Mapping[str, Any]) -> list[Plan]:
    """Return the cells of a study that is given as nested tables.

    Raises:
        ExperimentError: As for `read_grid`.
    """
    unknown = [key for key in table if key not in KEYS]
    if unknown:
        raise ExperimentError(
            f"A study has no {unknown[0]!r}.{alternatives(unknown[0], KEYS)} What belongs to the experiment goes under "
            "[experiment]."
        )
    file = structured(table, _File, "The study")
    tuning = dict(file.tune)
    if type(tuning.get("keep")) in {int, float}:  # one share is a list of one
        tuning["keep"] = [tuning["keep"]]
    tune = structured(tuning, Tune, "[tune]")
    axes = {name: entries_of(name, values) for name, values in file.axes.items()}
    for name, values in lists_in(file.vary, ""):
        if name in axes:
            raise ExperimentError(f"{name!r} is an axis twice: under [vary] and under [[axes]].")
        axes[name] = values_of(name, values)
    check_axes(axes, file.without, keeps=len(tune.keep) > 1)
    plans = [
        plan
        for chosen in itertools.product(*axes.values())
        if axes and not left_out(labels_of(axes, chosen), file.without)
        for plan in _plans(file.experiment, labels_of(axes, chosen), chosen, tune)
    ]
    single = [entry_of("cells", number, sets) for number, sets in enumerate(file.cells, start=1)]
    for entry in checked("cells", single) if single else ():
        plans += _plans(file.experiment, {"cell": entry.label}, [entry], tune)
    if not axes and not file.cells:
        plans = _plans(file.experiment, {}, [], tune)
    if not plans:
        raise ExperimentError("The study has no cell: [[without]] leaves out all of them.")
    if file.tune and not any(plan.knob for plan in plans):
        raise ExperimentError("[tune] is given, and no cell has a knob by which it could be tuned.")
    return plans


def labelled(experiments: Sequence[Experiment]) -> list[Plan]:
    """Experiments as cells, each labelled by the keys in which they differ."""
    each_flat = [dict(flat(e.to_dict(), "")) for e in experiments]
    names = dict.fromkeys(name for each in each_flat for name in each)
    differing = [
        n for n in names if len({json.dumps(f.get(n), default=list) for f in each_flat}) > 1
    ]
    return [
        Plan({name: label_of(each.get(name)) for name in differing}, e)
        for e, each in zip(experiments, each_flat, strict=True)
    ]


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ExperimentError(f"{path} cannot be read: {error.strerror}.") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ExperimentError(f"{path} is not TOML: {error}.") from error


# -- cells ------------------------------------------------------------------------------------------------------


def _plans(
    shared: Mapping[str, Any], labels: Mapping[str, str], chosen: Sequence[Entry], tune: Tune
) -> list[Plan]:
    """The cell of these entries: of several shares of utility to keep, one for each."""
    table = dict(shared)
    for entry in chosen:
        table = _merged(table, entry.sets)
    try:
        e = experiment_from(table)
    except ExperimentError as error:
        raise ExperimentError(f"{_named(labels)}: {error}") from error
    knobs = [entry.knob for entry in chosen if entry.knob is not None]
    if len(knobs) > 1:
        raise ExperimentError(f"{_named(labels)} has {len(knobs)} knobs: a cell is tuned by one.")
    if not knobs:
        return [Plan(labels, e)]
    several = len(tune.keep) > 1
    return [
        Plan(
            {**labels, "keep": label_of(keep)} if several else labels,
            e,
            knobs[0],
            keep,
            tune.trials,
        )
        for keep in tune.keep
    ]


def _named(labels: Mapping[str, str]) -> str:
    told = ", ".join(f"{name} = {label}" for name, label in labels.items())
    return f"The cell {told}" if told else "The cell"


def _merged(table: Mapping[str, Any], sets: Mapping[str, Any]) -> dict[str, Any]:
    """A table with what `sets` sets: tables within are merged, everything else is replaced."""
    merged = dict(table)
    for key, value in sets.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = _merged(old, value) if both else value  # type: ignore[arg-type]
    return merged
