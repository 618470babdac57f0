"""Commands of studies: study, export, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from vflair_core.cli.app import Json, NoPlugin, Overrides, Plugin, configure_logging, leave_out
from vflair_core.cli.tables import say, table
from vflair_core.errors import VflairError

if TYPE_CHECKING:
    from vflair_core.experiments.studies.cell import Cell
    from vflair_core.experiments.studies.outlook import Outlook


def study(
    file: Path,
    *,
    db: Annotated[Path | None, Parameter(help="The store; runs/NAME/study.db by default.")] = None,
    workers: Annotated[int, Parameter(help="Processes that work at a time.")] = 1,
    backend: Annotated[
        Literal["loky", "sequential", "ray", "dask"],
        Parameter(
            help="loky on this machine, sequential in this process, ray or dask on a cluster."
        ),
    ] = "loky",
    dry_run: Annotated[
        bool, Parameter(help="List the cells, what is left of each, and about how long that takes.")
    ] = False,
    retry: Annotated[bool, Parameter(help="Run again what failed before.")] = False,
    take_in: Annotated[
        list[Path] | None,
        Parameter(help="Another store whose finished pieces count as done; repeatable."),
    ] = None,
    override: Overrides = None,
    plugin: Plugin = None,
    no_plugin: NoPlugin = None,
    json_: Json = False,
) -> None:
    """Run the study in FILE: what is not done yet of its cells. Ctrl-C lets what is running end; the same command goes on."""
    leave_out(no_plugin)
    configure_logging(verbose=False)
    from vflair_core.cli.progress import progress
    from vflair_core.experiments.studies.grid import read_grid
    from vflair_core.experiments.studies.outlook import outlook
    from vflair_core.experiments.studies.study import study as run_study

    plans, place = read_grid(file, override or ()), db or Path("runs") / file.stem / "study.db"
    if dry_run:
        _show_outlook(outlook(plans, place, plugins=plugin or ()), workers, as_json=json_)
        return
    with progress(quiet=json_) as report:
        cells = run_study(
            plans,
            place,
            workers=workers,
            backend=backend,
            plugins=plugin or (),
            retry=retry,
            take_in=take_in or (),
            report=report,
        )
    _show_cells(cells, place, as_json=json_)
    if failed := [cell for cell in cells if cell.failed]:
        raise VflairError(
            f"{len(failed)} of {len(cells)} cells failed; the table says why. --retry runs them again."
        )


def export(
    db: Path,
    *,
    csv: Annotated[Path | None, Parameter(help="Folder for CSV files.")] = None,
    parquet: Annotated[Path | None, Parameter(help="Folder for Parquet files.")] = None,
) -> None:
    """Write what the study DB found as tables: grades, arms, trials of tunings, failures."""
    configure_logging(verbose=False)
    from vflair_core.experiments.studies.assembly import read_study
    from vflair_core.experiments.studies.records import export as export_rows

    if csv is None and parquet is None:
        raise VflairError("Say what to write: --csv FOLDER, --parquet FOLDER, or both.")
    cells = read_study(db)
    if not any(cell.result or cell.error for cell in cells):
        raise VflairError(f"No cell of {db} is done yet: there is nothing to write.")
    written = []
    if csv is not None:
        written += export_rows(cells, csv, "csv")
    if parquet is not None:
        written += export_rows(cells, parquet, "parquet")
    for path in written:
        say(str(path))


def report(
    db: Path,
    *,
    out: Annotated[Path, Parameter(help="The page, one HTML file.")] = Path("report.html"),
    title: Annotated[str | None, Parameter(help="Its title; the study's name by default.")] = None,
    tables: Annotated[
        Path | None, Parameter(help="Folder for the tables as Markdown and LaTeX.")
    ] = None,
    figures: Annotated[
        Path | None, Parameter(help="Folder for the figures as SVG and PNG.")
    ] = None,
) -> None:
    """Make a page of the study DB that needs no network: frontier, cuts, costs, ranking, and how to run each cell again."""
    configure_logging(verbose=False)
    from vflair_core.experiments.reports.figures import write_figures
    from vflair_core.experiments.reports.page import write_report
    from vflair_core.experiments.reports.tables import write_tables
    from vflair_core.experiments.studies.assembly import read_study

    cells = read_study(db)
    written = [write_report(cells, out, title=title or f"Study {db.parent.name or db.stem}")]
    if tables is not None:
        written += write_tables(cells, tables)
    if figures is not None:
        written += write_figures(cells, figures)
    for path in written:
        say(str(path))


def _show_outlook(ahead: Outlook, workers: int, *, as_json: bool) -> None:
    import attrs

    if as_json:
        say(json.dumps(attrs.asdict(ahead), indent=2))
        return
    axes = list(dict.fromkeys(name for cell in ahead.cells for name in cell.labels))
    rows = [
        (
            cell.key[:8],
            *(cell.labels.get(axis, "–") for axis in axes),
            cell.state,
            str(cell.pieces),
            cell.error,
        )
        for cell in ahead.cells
    ]
    table(("cell", *axes, "state", "pieces left", "error"), rows)
    told = ", ".join(f"{count} {kind}" for kind, count in ahead.left.items()) or "nothing"
    say("")
    say(f"{len(ahead.cells)} cells; left: {told}, each once, however many cells share it.")
    if not ahead.left:
        return
    known = (
        f"about {_time(ahead.seconds / workers)} with {workers} at a time" if ahead.seconds else ""
    )
    unknown = f"{ahead.unknown} of them are like nothing that ran before" if ahead.unknown else ""
    say("; ".join(filter(None, (known, unknown))) + ".")


def _show_cells(cells: list[Cell], place: Path, *, as_json: bool) -> None:
    from vflair_core.experiments.studies.records import failure_rows, grade_rows, trial_rows

    if as_json:
        tables = {"grades": grade_rows(cells), "trials": trial_rows(cells)}
        say(json.dumps(tables | {"failures": failure_rows(cells)}, indent=2))
        return
    axes = list(dict.fromkeys(name for cell in cells for name in cell.labels))
    columns = ("cell", *axes, "MP", "strongest attack", "AP", "interval", "floor", "verdict")
    rows = [
        (cell.key[:8], *(cell.labels.get(axis, "–") for axis in axes), *_shown(cell))
        for cell in cells
    ]
    table(columns, rows, whole=("interval",))
    say("")
    say(f"{place}; `vflair report {place}` makes a page of it, `vflair export {place}` tables.")


def _shown(cell: Cell) -> tuple[str, ...]:
    """Utility and the strongest attack of a cell's last arm; or why there is none."""
    if cell.result is None:
        return ("–", cell.error or "not run", "–", "–", "–", "–")
    name = "defended" if cell.experiment.defenses else "undefended"
    numbers = cell.result.numbers[name]
    performance = f"{numbers['main_performance']:.3f}"
    if not numbers["attacks"]:
        return (performance, "none", "–", "–", "–", "–")
    sound = [grade for grade in numbers["attacks"] if grade["verdict"] == "ok"]
    best = max(sound or numbers["attacks"], key=lambda grade: grade["attack_performance"])
    low, high = best["interval"]
    return (
        performance,
        f"{best['attack']} ({best['knowledge']})",
        f"{best['attack_performance']:.3f}",
        f"{low:.3f}–{high:.3f}",
        f"{best['floor']:.3f}",
        best["verdict"],
    )


def _time(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
