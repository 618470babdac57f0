"""What a reader must see first: controls that failed, attacks that ended early, seams that no attack read, and texts without a baseline."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from attrs import frozen

from vflair_core.attacks.knowledge import shown
from vflair_core.experiments.grading.grades import Grade
from vflair_core.experiments.reports.leakage import failed_control, is_baseline
from vflair_core.experiments.reports.settings import Group, Setting, arms_of, grades_of
from vflair_core.experiments.studies.cell import Cell


@frozen
class FailedControl:
    """A control of one attack that failed in one arm of one cell."""

    group: Group
    setting: Setting
    cell: Cell
    arm: str
    attack: str
    verdict: str


@frozen
class Unanswered:
    """An attack that had no guess at some of the private positions, in one arm of one cell."""

    setting: Setting
    cell: Cell
    arm: str
    attack: str
    share: float  # of the private positions


@frozen
class UnreadSeam:
    """Something that crossed in a setting and that none of its attacks read."""

    group: Group
    setting: Setting
    arm: str
    seam: str
    covered_by: tuple[str, ...]  # defenses


def failed_controls(groups: Iterable[Group]) -> list[FailedControl]:
    """All controls that failed, in the order of the cells; an undefended arm that cells share is named once."""
    return [
        FailedControl(group, setting, cell, arm, _named(grade), grade.verdict)
        for group, setting, cell, arm, grade in _grades(groups)
        if failed_control(grade)
    ]


def unanswered(groups: Iterable[Group]) -> list[Unanswered]:
    """All attacks that had no guess at some positions, as one whose budget ended: what they read is the least they could."""
    return [
        Unanswered(setting, cell, arm, _named(grade), grade.details["unanswered"])
        for _, setting, cell, arm, grade in _grades(groups)
        if grade.details.get("unanswered")
    ]


def _grades(groups: Iterable[Group]) -> Iterator[tuple[Group, Setting, Cell, str, Grade]]:
    """Every grade with where it stands; those of an undefended arm that cells share once."""
    seen = set[tuple[Any, ...]]()
    for group in groups:
        for setting in group.settings:
            for cell in setting.cells:
                for arm in arms_of(cell):
                    for grade in grades_of(cell, arm):
                        shared = setting.base if arm.endswith("undefended") else setting.key
                        told = (_named(grade), grade.verdict, grade.attack_performance)
                        place = (shared, cell.experiment.seed, arm, *told)
                        if place not in seen:
                            seen.add(place)
                            yield group, setting, cell, arm, grade


def _named(grade: Grade) -> str:
    return f"{grade.attack} ({shown(grade.knowledge)})"


def unread_seams(groups: Iterable[Group]) -> list[UnreadSeam] | None:
    """All seams that something crossed and no attack read; None where no result says which seams there are."""
    found, known = list[UnreadSeam](), False
    for group in groups:
        for setting in group.settings:
            for arm in ("undefended", "defended") if setting.defended else ("undefended",):
                seams = _seams(setting, arm)
                known = known or bool(seams)
                found += [
                    UnreadSeam(group, setting, arm, name, tuple(row["covered_by"]))
                    for name, row in seams.items()
                    if row["crossed"] and not row["read"]
                ]
    return found if known else None


def without_baseline(groups: Iterable[Group]) -> list[tuple[str, list[str]]]:
    """Groups, each with those settings in which attacks read texts and the linear map did not, or not with every seed."""
    found = []
    for group in groups:
        names = [setting.name for setting in group.settings if _lacks_baseline(setting)]
        if names:
            found.append((group.name, names))
    return found


def _lacks_baseline(setting: Setting) -> bool:
    each = [
        [grade for grade in trial.grades[arm] if grade.target == "tokens"]
        for trial in setting.trials
        for arm in trial.arms
    ]
    return any(grades and not any(map(is_baseline, grades)) for grades in each)


def _seams(setting: Setting, arm: str) -> Mapping[str, Mapping[str, Any]]:
    """The seams of an arm by name; one that any cell's attacks read was read."""
    together: dict[str, dict[str, Any]] = {}
    for cell in setting.cells:
        assert cell.result is not None  # of a setting
        for row in cell.result.numbers.get(arm, {}).get("seams", ()):
            of = together.setdefault(row["seam"], {"crossed": 0, "covered_by": {}, "read": False})
            of["crossed"] += row["crossed"]
            of["covered_by"] |= dict.fromkeys(each["defense"] for each in row["covered_by"])
            of["read"] = of["read"] or bool(row["read_by"])
    return together
