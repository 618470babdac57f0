"""The report of a study: one HTML page that needs no network, with every number linked to what it came of."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import urllib.parse
from collections.abc import Iterable, Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from vflair_core.attacks.knowledge import shown
from vflair_core.errors import ExperimentError
from vflair_core.experiments.config import to_toml
from vflair_core.experiments.output import aside
from vflair_core.experiments.reports import drawing
from vflair_core.experiments.reports.charts import charts_of, drawn_settings, leaks_of
from vflair_core.experiments.reports.concerns import (
    failed_controls,
    unanswered,
    unread_seams,
    without_baseline,
)
from vflair_core.experiments.reports.drawing import Drawing, draw
from vflair_core.experiments.reports.grouping import groups_of, text_of, why_unread
from vflair_core.experiments.reports.leakage import BASELINE
from vflair_core.experiments.reports.settings import Group, arms_of, grades_of
from vflair_core.experiments.reports.standings import Standing, Unranked, standings_of
from vflair_core.experiments.reports.tables import Table, leakage_table
from vflair_core.experiments.result import Result
from vflair_core.experiments.studies.cell import Cell

TEMPLATES = Path(__file__).parent / "templates"
KINDS = {  # of figures, in their order: a heading, and how to read them
    "frontier": (
        "Utility and leakage",
        "Bottom right is best: all utility kept, nothing recovered.",
    ),
    "cut": ("Leakage by cut", "The deeper the cut, the more the data party holds and computes."),
    "cost": (
        "Cost and leakage",
        "Bottom left is best. Bytes are counted at the channel; seconds depend on the machine and on what else ran there.",
    ),
}


def write_report(
    cells: Iterable[Cell], path: str | Path, *, title: str = "Study", written: date | None = None
) -> Path:
    """Write the report of a study to `path` and return it.

    The page holds no private text: samples of results are left out.

    Args:
        cells: Of one study or several, in any state.
        path: The HTML file; one that is there is replaced.
        title: The heading of the page.
        written: The day that the page names; today by default.

    Raises:
        ExperimentError: There is no cell, jinja2 is not installed, or the file cannot be written.
    """
    every = list(cells)
    if not every:
        raise ExperimentError("There is no cell to report. Run the study first: vflair study FILE.")
    text = _page(every, title, written or datetime.now(UTC).date())
    path = Path(path)
    with aside(path) as part:
        part.write_text(text, encoding="utf-8")
    return path


def _page(cells: Sequence[Cell], title: str, written: date) -> str:
    groups = groups_of(cells)
    standings, unranked = standings_of(groups)
    done = [cell for cell in cells if why_unread(cell) not in ("failed", "not run")]
    failed = [cell for cell in cells if why_unread(cell) == "failed"]
    not_run = [cell for cell in cells if why_unread(cell) == "not run"]
    waiting = {id(cell) for cell in (*failed, *not_run)}
    apart = [(c, why) for c in cells if (why := why_unread(c)) and id(c) not in waiting]
    style, script = ((TEMPLATES / f"page.{ending}").read_text("utf-8") for ending in ("css", "js"))
    return (
        _environment()
        .get_template("page.html.jinja")
        .render(
            title=title,
            written=written.isoformat(),
            style=_trusted(style),
            script=_trusted(script),
            style_hash=_hash(style),
            script_hash=_hash(script),
            done=done,
            failed=failed,
            apart=apart,
            not_run=not_run,
            controls=failed_controls(groups),
            unanswered=unanswered(groups),
            seams=unread_seams(groups),
            no_baseline=without_baseline(groups),
            baseline=BASELINE,
            ran=_ran(cells),
            groups=[_figures(group) for group in groups],
            legends=[_legend(group) for group in groups],
            numbered=any(len(group.heads) > 1 for group in groups),
            kinds=KINDS,
            standings=standings,
            unranked=[*_rows_of(unranked), *_incomplete(apart)],
            filters=_filters(standings),
        )
    )


def _figures(group: Group) -> tuple[Group, list[Drawing], Table]:
    leaks = leaks_of(group)
    return group, [draw(chart) for chart in charts_of(group, leaks)], leakage_table(group, leaks)


def _environment() -> Any:
    """Templates that escape whatever they are given."""
    if importlib.util.find_spec("jinja2") is None:
        raise ExperimentError("The report needs jinja2: pip install 'vflair-core[report]'.")
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {
        "number": lambda value: "–" if value is None else f"{value:.3f}",
        "signed": lambda value: f"{value:+.3f}".replace("-", "−"),
        "percent": lambda value: f"{value:.1%}",
        "brief": lambda value: f"{value:.4g}" if isinstance(value, float) else str(value),
        "interval": _interval,
        "toml": to_toml,
        "data_link": _data_link,
        "versions": _versions,
        "guarantees": _guarantees,
        "arms": arms_of,
        "unread": why_unread,
        "called": _called,
    }
    environment.globals |= {
        "grades_of": grades_of,
        "shape": drawing.shape,
        "short": drawing.SHORT,
        "width": drawing.WIDTH,
        "height": drawing.HEIGHT,
        "left": drawing.LEFT,
        "right": drawing.RIGHT,
        "top": drawing.TOP,
        "bottom": drawing.BOTTOM,
    }
    return environment


def _trusted(text: str) -> Any:
    """Our own style or script, which is not escaped: the policy of the page names its hash."""
    from markupsafe import Markup

    return Markup(text)  # noqa: S704 - it is a file of this package


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _ran(cells: Sequence[Cell]) -> dict[str, list[str]]:
    """What was run, each thing once and in the order of the cells."""
    experiments = [cell.experiment for cell in cells]
    results = [cell.result for cell in cells if cell.result is not None]
    found: dict[str, Iterable[str]] = {
        "models": (e.model.name or f"{e.model.config['model_type']}, random" for e in experiments),
        "tasks": (text_of(e.task) for e in experiments),
        "cuts": (
            f"{e.partition.kind}, head {e.partition.head}, tail {e.partition.tail}"
            for e in experiments
        ),
        "defenses": (" + ".join(map(text_of, e.defenses)) or "undefended" for e in experiments),
        "attacks": (f"{text_of(a)} knowing {_known(a.knowledge)}" for e in experiments for a in e.attacks),
        "seeds": (str(seed) for e in experiments for seed in e.seeds or (e.seed,)),
        "versions": map(_versions, results),
        "plugins": (
            f"{info['source']} {info['version'] or ''}".strip() for r in results for info in r.plugins
        ),
    }  # fmt: skip
    return {name: list(dict.fromkeys(each)) for name, each in found.items()}


def _known(knowledge: str | tuple[str, ...]) -> str:
    return knowledge if isinstance(knowledge, str) else shown(knowledge)


def _legend(group: Group) -> list[tuple[str, int, str, str]]:
    """What looks alike in the figures of a group: letter, number, name, and the key of the first setting."""
    seen: dict[str, tuple[str, int, str, str]] = {}
    settings = list(drawn_settings(group))
    alone = {letter: sum(letter == other for other, _, _ in settings) for letter, _, _ in settings}
    for letter, number, setting in settings:
        name = setting.name if alone[letter] == 1 else setting.defense
        seen.setdefault(letter, (letter, number, name, setting.key))
    return list(seen.values())


def _filters(standings: Sequence[Standing]) -> list[tuple[str, str, list[str]]]:
    columns = {
        "model": ("model", [row.group.model for row in standings]),
        "task": ("task", [row.group.task for row in standings]),
        "cut": ("kind of cut", [row.group.cut for row in standings]),
        "knowledge": ("attacker knows", [row.knowledge for row in standings]),
    }
    return [(name, label, list(dict.fromkeys(values))) for name, (label, values) in columns.items()]


def _rows_of(unranked: Sequence[Unranked]) -> list[tuple[Any, ...]]:
    return [
        (row.setting.name, row.group.name, row.knowledge, row.reason, row.setting.cells)
        for row in unranked
    ]


def _incomplete(apart: Sequence[tuple[Cell, str]]) -> list[tuple[Any, ...]]:
    """Cells with a defense that are done and cannot be read beside others."""
    return [
        (_called(cell), cell.experiment.task.name, "", reason, (cell,))
        for cell, reason in apart
        if cell.experiment.defenses
    ]


def _called(cell: Cell) -> str:
    """A cell by its place in the grid, or by its defenses."""
    if cell.labels:
        return ", ".join(f"{axis} {value}" for axis, value in cell.labels.items() if axis != "seed")
    return " + ".join(map(text_of, cell.experiment.defenses)) or "undefended"


def _interval(bounds: Sequence[float] | None) -> str:
    return "" if bounds is None else f"[{bounds[0]:.3f}, {bounds[1]:.3f}]".replace("-", "−")


def _data_link(cell: Cell) -> str:
    return f"data:application/toml;charset=utf-8,{urllib.parse.quote(to_toml(cell.experiment), safe='')}"


def _versions(result: Result) -> str:
    return ", ".join(f"{name} {version}" for name, version in result.versions.items())


def _guarantees(cell: Cell) -> list[tuple[str, str]]:
    assert cell.result is not None  # asked of finished cells only
    return [
        (arm, promise["statement"])
        for arm in arms_of(cell)
        for promise in cell.result.numbers[arm].get("guarantees", ())
    ]
