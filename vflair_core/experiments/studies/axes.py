"""The axes of a study: the values of each with their labels, and what each sets of an experiment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attrs import frozen

from vflair_core.errors import ExperimentError, alternatives
from vflair_core.experiments.config import structured
from vflair_core.experiments.studies.tuning import Knob

OF_ENTRY = ("label", "knob")  # of an entry of an axis, beside keys of an experiment


@frozen
class Entry:
    """One value of an axis: its label, what it sets of an experiment, and its knob."""

    label: str
    sets: Mapping[str, Any]
    knob: Knob | None = None


def check_axes(
    axes: Mapping[str, list[Entry]], without: Sequence[Mapping[str, Any]], *, keeps: bool
) -> None:
    """See that each key is set by one axis, and that what is left out is there.

    Raises:
        ExperimentError: It is not so.
    """
    setters: dict[str, str] = {}
    for name, entries in axes.items():
        for key in {key for entry in entries for key, _ in flat(entry.sets, "")}:
            if (other := setters.setdefault(key, name)) != name:
                raise ExperimentError(
                    f"{key} is set by the axis {other} and by the axis {name}: let one of them set it."
                )
    if keeps and "keep" in axes:
        raise ExperimentError(
            "With several tune.keep these are an axis: call yours something else."
        )
    for each in without:
        if not each:
            raise ExperimentError(
                "An entry of [[without]] names no axis: it would leave out nothing."
            )
        for name, value in each.items():
            if name not in axes:
                raise ExperimentError(
                    f"[[without]] names the axis {name!r}.{alternatives(name, list(axes))}"
                )
            labels = [entry.label for entry in axes[name]]
            if unknown := [label for label in _listed(value) if label not in labels]:
                raise ExperimentError(
                    f"[[without]] names {name} = {unknown[0]!r}.{alternatives(unknown[0], labels)}"
                )


def lists_in(table: Any, prefix: str) -> Iterator[tuple[str, list[Any]]]:
    """The lists in nested tables, by their dotted keys."""
    if not isinstance(table, Mapping):
        raise ExperimentError(f"vary.{prefix} = {table!r}: give a list of its values.")
    for key, value in table.items():
        name = f"{prefix}.{key}" if prefix else key
        if isinstance(value, list):
            yield name, value
        else:
            yield from lists_in(value, name)


def values_of(name: str, values: list[Any]) -> list[Entry]:
    """The entries of an axis that is a list of values of one key.

    Raises:
        ExperimentError: There is none, or one comes twice.
    """
    entries = [Entry(label_of(value), _nested(name, value)) for value in values]
    return checked(name, entries)


def entries_of(name: str, values: Any) -> list[Entry]:
    """The entries of an axis that is a list of tables.

    Raises:
        ExperimentError: It is no such list, or as for `checked`.
    """
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise ExperimentError(f"axes.{name} is no list of tables: write [[axes.{name}]] for each.")
    return checked(name, [entry_of(f"axes.{name}", n, v) for n, v in enumerate(values, start=1)])


def entry_of(where: str, number: int, table: Mapping[str, Any]) -> Entry:
    """One entry, labelled by its number if it has no label.

    Raises:
        ExperimentError: Its knob does not fit.
    """
    sets = {key: value for key, value in table.items() if key not in OF_ENTRY}
    knob = table.get("knob")
    return Entry(
        str(table.get("label", number)),
        sets,
        None if knob is None else structured(knob, Knob, f"The knob of {where}, number {number},"),
    )


def checked(name: str, entries: list[Entry]) -> list[Entry]:
    """The entries of an axis, if there are any and their labels differ.

    Raises:
        ExperimentError: There is none, or two have one label.
    """
    labels = [entry.label for entry in entries]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice or not labels:
        told = f"the label {twice[0]!r} twice" if twice else "no value"
        raise ExperimentError(
            f"The axis {name} has {told}: give each of its values once, with a label of its own."
        )
    return entries


def labels_of(axes: Mapping[str, Any], chosen: Sequence[Entry]) -> dict[str, str]:
    """The labels of a cell by axis."""
    return {name: entry.label for name, entry in zip(axes, chosen, strict=True)}


def left_out(labels: Mapping[str, str], without: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a cell is left out."""
    for each in without:
        if all(labels[name] in _listed(value) for name, value in each.items()):
            return True
    return False


def _listed(value: Any) -> list[str]:
    return [label_of(each) for each in value] if isinstance(value, list) else [label_of(value)]


def _nested(name: str, value: Any) -> dict[str, Any]:
    first, _, rest = name.partition(".")
    return {first: _nested(rest, value) if rest else value}


def flat(table: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """The values of nested tables by their dotted keys."""
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def label_of(value: Any) -> str:
    """A value in a word: a thing by its name, several by theirs."""
    match value:
        case Mapping() if "name" in value and isinstance(value.get("options", {}), Mapping):
            options = ", ".join(f"{k} {label_of(v)}" for k, v in value.get("options", {}).items())
            return f"{value['name']}{f' ({options})' if options else ''}"
        case Mapping():
            return ", ".join(f"{key} {label_of(each)}" for key, each in value.items()) or "none"
        case list() | tuple():
            return " + ".join(label_of(each) for each in value) or "none"
        case bool():
            return str(value).lower()
        case float():
            return f"{value:g}"
        case _:
            return str(value)
