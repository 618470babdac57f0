"""The figures of a study as data: which points, with which intervals and marks, on which axes."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from attrs import frozen

from vflair_core.experiments.reports.leakage import UTILITY_UNKNOWN, Leak, knowledge_of, leak_of
from vflair_core.experiments.reports.settings import Group, Setting
from vflair_core.experiments.studies.cell import Cell

REFERENCE = "U"  # the letter of undefended points
RECOVERED = "recovered (AP), lower is better"


@frozen
class Point:
    """One point: a setting, with its interval in either direction.

    `mark` is "", or in words what is wrong with it; such a point is drawn hollow and crossed.
    """

    x: float
    y: float
    y_range: tuple[float, float]
    letter: str
    text: str
    key: str  # of the setting
    x_range: tuple[float, float] | None = None
    mark: str = ""


@frozen
class Series:
    """The points of one defense; they look alike, and a line joins them where the chart counts."""

    name: str
    letter: str
    number: int  # of its colour and shape; -1 of what is undefended
    points: tuple[Point, ...]


@frozen
class Chart:
    """A figure: its words, its axes and its series."""

    kind: str  # frontier, cut or cost
    title: str
    panel: str  # the title beside others of its kind
    description: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    floor: float
    counts: bool = (
        False  # the horizontal axis counts things: points stand side by side, and lines join them
    )

    @property
    def points(self) -> tuple[Point, ...]:
        return tuple(point for each in self.series for point in each.points)

    @property
    def marks(self) -> tuple[str, ...]:
        """The words that stand at points of this figure."""
        return tuple(dict.fromkeys(point.mark for point in self.points if point.mark))


@frozen
class Shown:
    """A setting as figures and tables show it, and what leaks there."""

    letter: str
    number: int  # of its colour and shape; -1 of what is undefended
    setting: Setting
    leak: Leak


Leaks = Mapping[tuple[str, str], Sequence[Shown]]  # by target and knowledge


def charts_of(group: Group, leaks: Leaks) -> tuple[Chart, ...]:
    """All figures of a group: its frontiers, leakage by cut where there are several, and cost at the most knowledge."""
    frontiers = _told_apart(_frontier(group, place, shown) for place, shown in leaks.items())
    cuts, costs = list[Chart](), list[Chart]()
    if len(group.heads) > 1:
        cuts = _told_apart(_by_cut(group, place, shown) for place, shown in leaks.items())
    most = {target: (target, knowledge) for target, knowledge in leaks}
    for place in most.values():
        costs += [_by_cost(group, place, leaks[place], kind) for kind in ("bytes", "seconds")]
    return (*frontiers, *cuts, *costs)


def leaks_of(group: Group) -> Leaks:
    """What leaks of each target, from little knowledge to much."""
    settings = list(drawn_settings(group))
    found: dict[tuple[str, str], list[Shown]] = {}
    for target, labels in _seen(group):
        for knowledge in labels:
            for letter, number, setting in settings:
                arm = "undefended" if number < 0 else "defended"
                leak = leak_of(setting, arm, knowledge, target)
                if leak is not None:
                    shown = Shown(letter, number, setting, leak)
                    found.setdefault((target, knowledge), []).append(shown)
    return found


def drawn_settings(group: Group) -> Iterator[tuple[str, int, Setting]]:
    """The settings of a group as figures show them: undefended references first, each with its letter and number."""
    for reference in group.references:
        yield REFERENCE, -1, reference
    defended = [setting for setting in group.settings if setting.defended]
    lines = list(dict.fromkeys(setting.line for setting in defended))
    for setting in defended:
        number = lines.index(setting.line)
        yield _letter(number), number, setting


def _seen(group: Group) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The targets that are attacked in a group, each with what its attackers know."""
    grades = [
        grade
        for setting in group.settings
        for trial in setting.trials
        for each in trial.grades.values()
        for grade in each
    ]
    for target in sorted({grade.target for grade in grades}):
        yield target, knowledge_of(grade for grade in grades if grade.target == target)


def _told_apart(charts: Iterable[Chart]) -> list[Chart]:
    """The charts that show something else than those before."""
    seen = dict[tuple[tuple[float, float, str], ...], Chart]()
    for chart in charts:
        seen.setdefault(tuple((p.x, p.y, p.mark) for p in chart.points), chart)
    return list(seen.values())


def _frontier(group: Group, where: tuple[str, str], shown: Sequence[Shown]) -> Chart:
    target, knowledge = where

    def place(setting: Setting) -> _Place:
        each = [trial.utility for trial in setting.trials]
        spread = (min(each), max(each)) if len(each) > 1 else None
        mark = "" if all(trial.learns for trial in setting.trials) else UTILITY_UNKNOWN
        return sum(each) / len(each), spread, mark

    series, floor = _series(group, shown, place)
    return Chart(
        kind="frontier",
        title=f"Utility and leakage of {target}, attacker knows {knowledge}",
        panel=_panel(target, knowledge),
        description=f"{group.name}: what the strongest attack with {knowledge} recovers, against the share of the "
        "undefended utility above chance that is kept. Bottom right is best.",
        x_label="utility kept (share of undefended), higher is better",
        y_label=RECOVERED,
        series=series,
        floor=floor,
    )


def _by_cut(group: Group, where: tuple[str, str], shown: Sequence[Shown]) -> Chart:
    target, knowledge = where
    series, floor = _series(group, shown, lambda setting: (setting.head, None, ""))
    return Chart(
        kind="cut",
        title=f"Leakage of {target} by cut, attacker knows {knowledge}",
        panel=_panel(target, knowledge),
        description=f"{group.name}: what the strongest attack with {knowledge} recovers, by the number of blocks that "
        "the data party keeps before the cut.",
        x_label="blocks at the data party before the cut",
        y_label=RECOVERED,
        series=series,
        floor=floor,
        counts=True,
    )


def _by_cost(group: Group, where: tuple[str, str], shown: Sequence[Shown], kind: str) -> Chart:
    target, knowledge = where
    words = {
        "bytes": ("bytes that cross", "MB that crossed, both ways"),
        "seconds": ("time", "seconds without attacks"),
    }[kind]
    series, floor = _series(group, shown, lambda setting: (_cost(setting, kind), None, ""))
    return Chart(
        kind="cost",
        title=f"Cost in {words[0]} and leakage of {target}, attacker knows {knowledge}",
        panel=f"{words[0].capitalize()}: {_panel(target, knowledge)}",
        description=f"{group.name}: what the strongest attack with {knowledge} recovers, against what the arm costs in "
        f"{words[0]}. Bottom left is best.",
        x_label=f"{words[1]}, lower is better",
        y_label=RECOVERED,
        series=series,
        floor=floor,
    )


_Place = tuple[float, tuple[float, float] | None, str]  # with what is wrong with it, or ""


def _series(
    group: Group, shown: Sequence[Shown], place: Callable[[Setting], _Place]
) -> tuple[tuple[Series, ...], float]:
    """What is shown as points, and the highest floor among them."""
    points: dict[tuple[str, str, int, str], list[Point]] = {}
    for each in shown:
        setting, leak = each.setting, each.leak
        x, x_range, wrong = place(setting)
        mark = leak.mark or wrong
        key = (setting.line, each.letter, each.number, setting.defense)
        of_series = points.setdefault(key, [])
        of_series.append(
            Point(
                x=x,
                x_range=x_range,
                y=leak.attack_performance,
                y_range=leak.interval,
                letter=f"{each.letter}{setting.head}" if len(group.heads) > 1 else each.letter,
                text=_sentence(setting, leak, mark),
                key=setting.key,
                mark=mark,
            )
        )
    series = tuple(
        Series(name, letter, number, tuple(sorted(each, key=lambda p: p.x)))
        for (_, letter, number, name), each in points.items()
    )
    return series, max((each.leak.floor for each in shown), default=0.0)


def _sentence(setting: Setting, leak: Leak, mark: str) -> str:
    low, high = leak.interval
    told = f"{setting.name}: AP {leak.attack_performance:.3f} [{low:.3f}, {high:.3f}], "
    told += f"{' or '.join(leak.attacks)}, floor {leak.floor:.3f}"
    return f"{told}; {mark}" if mark else told


def _panel(target: str, knowledge: str) -> str:
    return f"{target}, attacker knows {knowledge}"


def _letter(number: int) -> str:
    """Letters from A on without that of the reference; after Z comes A'."""
    letters = string.ascii_uppercase.replace(REFERENCE, "")
    again, place = divmod(number, len(letters))
    return letters[place] + "'" * again


def cost_of_setting(setting: Setting) -> tuple[float, float]:
    """Megabytes that crossed and seconds without attacks, of the last arm, as means over seeds."""
    return _cost(setting, "bytes"), _cost(setting, "seconds")


def _cost(setting: Setting, kind: str) -> float:
    arm = "defended" if setting.defended else "undefended"
    each = [_of_cells(trial.cells, arm, kind) for trial in setting.trials]
    return sum(each) / len(each)


def _of_cells(cells: Iterable[Cell], arm: str, kind: str) -> float:
    """The cost of an arm that cells share: the most that one of them counted, since others may have taken its work."""
    most = 0.0
    for cell in cells:
        cost = cell.result.cost.get(arm, {}) if cell.result is not None else {}
        phases = cost.get("seconds", {})
        counted = {
            "bytes": cost.get("total_bytes", 0) / 1e6,
            "seconds": sum(seconds for phase, seconds in phases.items() if phase != "attacks"),
        }
        most = max(most, counted[kind])
    return most
