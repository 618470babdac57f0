"""What a report compares: the seeds of one setting, and the settings of one model, task and kind of cut."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import attrs
from attrs import frozen

from vflair_core.experiments.experiment import Experiment
from vflair_core.experiments.grading.grades import Grade
from vflair_core.experiments.studies.cell import Cell

_FIELDS = [each.name for each in attrs.fields(Grade)]


@frozen(slots=False)
class Trial:
    """One seed of a setting: its cells, which differ in their attacks only.

    `cells` are finished and have an undefended arm.
    """

    seed: int
    cells: tuple[Cell, ...]

    def arm(self, name: str) -> Mapping[str, Any]:
        """The numbers of an arm; of what its cells share, as the first has it."""
        return _result(self.cells[0]).numbers[name]

    @cached_property
    def arms(self) -> tuple[str, ...]:
        """The arms without an active adversary that there are."""
        there = _result(self.cells[0]).numbers
        return tuple(name for name in ("undefended", "defended") if name in there)

    @cached_property
    def grades(self) -> Mapping[str, tuple[Grade, ...]]:
        """The grades of each arm, of all cells together and in one order."""
        return {
            arm: tuple(grade for cell in self.cells for grade in grades_of(cell, arm))
            for arm in self.arms
        }

    @cached_property
    def scores(self) -> tuple[float | None, ...]:
        """The chance-normalised score against each attack, in the order of `grades`."""
        return tuple(
            row["normalised"]
            for cell in self.cells
            for row in _result(cell).numbers.get("dcs", {}).get("per_attack", ())
        )

    def evaluated(self, target: str) -> bool:
        """Whether an attack on `target` took the defense into account."""
        each = [_result(cell).numbers["defended"].get("evaluated", {}) for cell in self.cells]
        return any(found.get(target, False) for found in each)

    @cached_property
    def utility(self) -> float:
        """The share of the undefended main performance above chance that is kept."""
        chance, best = (self.arm("undefended")[name] for name in ("chance", "main_performance"))
        reach = best - chance
        return (self.arm(self.arms[-1])["main_performance"] - chance) / reach if reach > 0 else 1.0

    @property
    def learns(self) -> bool:
        """Whether the undefended arm is above chance, so that a share of it means something."""
        plain = self.arm("undefended")
        return plain["main_performance"] > plain["chance"]


@frozen(slots=False)
class Setting:
    """The same experiment with one seed or several: all that is equal but seed and attacks."""

    key: str
    defense: str  # as figures call it
    place: str  # where it stands on the other axes of its group, or ""
    base: str  # the same for settings that share their undefended arms
    line: str  # the same for settings that differ in the depth of the cut only
    experiment: Experiment
    trials: tuple[Trial, ...]

    @property
    def name(self) -> str:
        return ", ".join(filter(None, (self.defense, self.place)))

    @property
    def defended(self) -> bool:
        return bool(self.experiment.defenses)

    @property
    def cells(self) -> tuple[Cell, ...]:
        return tuple(cell for trial in self.trials for cell in trial.cells)

    @property
    def head(self) -> int:
        return self.experiment.partition.head

    def mean(self, arm: str, number: str = "main_performance") -> float:
        """The mean over seeds of a number of an arm."""
        return sum(trial.arm(arm)[number] for trial in self.trials) / len(self.trials)


@frozen
class Group:
    """The settings that one figure compares: of one model, one task and one kind of cut.

    `references` are settings without defenses, one for all settings that share their undefended arms.
    """

    model: str
    task: str
    cut: str  # HT or HBT
    settings: tuple[Setting, ...]
    references: tuple[Setting, ...]

    @property
    def name(self) -> str:
        return f"{self.model} · {self.task} · {self.cut}"

    @property
    def key(self) -> str:
        """A short name for files and for places in a page."""
        return hash_of([self.model, self.task, self.cut])[:8]

    @property
    def heads(self) -> tuple[int, ...]:
        return tuple(sorted({setting.head for setting in self.settings}))


def grades_of(cell: Cell, arm: str) -> tuple[Grade, ...]:
    """The grades of an arm as the cell has them, or made anew of its numbers, without hits."""
    if arm in cell.grades:
        return tuple(cell.grades[arm])
    rows = _result(cell).numbers[arm]["attacks"]
    return tuple(
        Grade(**{k: v for k, v in row.items() if k in _FIELDS and k != "knowledge"},
              knowledge=tuple(row["knowledge"].split("+")))
        for row in rows
    )  # fmt: skip


def arms_of(cell: Cell) -> list[str]:
    """All arms of a finished cell in which attacks ran, those under an active adversary too."""
    return [
        name
        for name, numbers in _result(cell).numbers.items()
        if name.endswith("defended") and isinstance(numbers, dict) and "attacks" in numbers
    ]


def hash_of(what: Any) -> str:
    """Return a short name for plain values or a record: equal for what is equal."""
    plain = attrs.asdict(what) if attrs.has(type(what)) else what
    text = json.dumps(plain, sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _result(cell: Cell) -> Any:
    assert cell.result is not None, "only finished cells are put together"
    return cell.result
