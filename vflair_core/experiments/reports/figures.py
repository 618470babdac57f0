"""The figures of a study as files, SVG and PNG, for papers and slides."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vflair_core.errors import ExperimentError
from vflair_core.experiments.output import aside
from vflair_core.experiments.reports.charts import Chart, Series, charts_of, leaks_of
from vflair_core.experiments.reports.grouping import groups_of
from vflair_core.experiments.studies.cell import Cell

# The shapes of the page, in its order; the four-pointed ring of what is undefended is a star here.
_SHAPES = ("o", "s", "^", "D", "v", "h", "p", ">")
_COLOURS = ("#0067a5", "#c2480a", "#00795a", "#a8437f", "#8a6a00", "#2b7fc4", "#6f45b8", "#5d6670")
_DASHES = ("-", "--", ":", "-.")


def write_figures(cells: Iterable[Cell], folder: str | Path) -> list[Path]:
    """Draw every figure of the report into `folder`, each as SVG and as PNG, and return their paths.

    A file is named by its kind, its place among them and its group, as a table of leakage is.

    Args:
        cells: Of one study or several.
        folder: It is made; figures of the same name that are there are replaced.

    Raises:
        ExperimentError: matplotlib is not installed, or the folder cannot be written: nothing is drawn.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ExperimentError(
            "Figures need matplotlib: pip install 'vflair-core[report]'. Nothing was drawn."
        )
    from matplotlib import rc_context

    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    written = []
    for group in groups_of(cells):
        for number, chart in enumerate(charts_of(group, leaks_of(group)), start=1):
            title = f"{group.name}\n{chart.title}"
            # Words stay words, and equal numbers give equal files.
            with rc_context({"svg.fonttype": "none", "svg.hashsalt": "vflair"}):
                figure = _draw(chart, title)
                for ending in ("svg", "png"):
                    path = place / f"{chart.kind}-{number}-{group.key}.{ending}"
                    with aside(path) as part:
                        figure.savefig(part, format=ending, dpi=200, metadata=_about(ending, chart))
                    written.append(path)
    return written


def _about(ending: str, chart: Chart) -> Mapping[str, Any]:
    if ending == "png":
        return {"Title": chart.title, "Description": chart.description}
    return {"Title": chart.title, "Description": chart.description, "Date": None}


def _draw(chart: Chart, title: str) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes: Any = figure.subplots()
    apart = min(0.06, 0.6 / max(len(chart.series), 1))
    for place, series in enumerate(chart.series):
        aside_by = apart * (place - (len(chart.series) - 1) / 2) if chart.counts else 0.0
        _draw_series(axes, series, aside_by, lines=chart.counts)
    if chart.marks:
        hollow = {"marker": "o", "linestyle": "", "color": "gray", "markerfacecolor": "white"}
        axes.plot([], [], label=f"hollow, crossed: {', '.join(chart.marks)}", **hollow)
    axes.axhline(chart.floor, color="gray", linestyle=":", label="floor")
    axes.set_title(title, fontsize="medium")
    axes.set(xlabel=chart.x_label, ylabel=chart.y_label, ylim=(-0.02, 1.05))
    if chart.counts:
        across = [point.x for point in chart.points]
        axes.set_xticks(sorted(set(across)))
        axes.set_xlim(min(across) - 0.5, max(across) + 0.7)
    elif chart.kind == "frontier":
        axes.set_xlim(min([0.0, *(p.x for p in chart.points)]) - 0.05, None)
    axes.grid(axis="y", alpha=0.3)
    figure.legend(fontsize="small", loc="outside lower center", ncols=2)
    return figure


def _draw_series(axes: Any, series: Series, aside_by: float, *, lines: bool) -> None:
    reference = series.number < 0
    colour = "black" if reference else _COLOURS[series.number % len(_COLOURS)]
    shape = "*" if reference else _SHAPES[(series.number + series.number // 8) % 8]
    size = 11 if reference else 7
    across = [point.x + aside_by for point in series.points]
    if lines and len(across) > 1:
        dash = "-" if reference else _DASHES[series.number % len(_DASHES)]
        axes.plot(across, [p.y for p in series.points], linestyle=dash, color=colour, linewidth=1)
    for x, point in zip(across, series.points, strict=True):
        low, high = point.y_range
        axes.vlines(x, low, high, color=colour, linewidth=1, alpha=0.7)
        if point.x_range is not None:
            axes.hlines(point.y, *point.x_range, color=colour, linewidth=1, alpha=0.7)
        face = "white" if point.mark else colour
        axes.plot(x, point.y, shape, color=colour, markerfacecolor=face, markersize=size)
        words = point.letter
        if point.mark:
            axes.plot(x, point.y, "x", color=colour, markersize=size + 3)
            words = f"{words} {point.mark}"
        axes.annotate(words, (x, point.y), (6, 5), textcoords="offset points", fontsize="x-small")
    axes.plot([], [], shape, color=colour, label=f"{series.letter}  {series.name}")
