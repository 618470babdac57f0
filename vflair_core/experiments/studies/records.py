"""What a study found as flat rows, for data frames and for files: of each grade, of each arm, of each trial of a tuning."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from vflair_core.errors import ExperimentError
from vflair_core.experiments.attack_phase import REFERENCES
from vflair_core.experiments.output import aside
from vflair_core.experiments.studies.cell import Cell

Row = dict[str, Any]
Format = Literal["csv", "parquet"]


def grade_rows(cells: Iterable[Cell]) -> list[Row]:
    """A row for each attack on each arm of each cell that is done.

    Columns are ``axis:NAME`` for each axis, what was run, the arm's utility, and the grade: `attack_performance` with
    the ends `low` and `high` of its interval, `floor`, controls and verdict. `dcs` and `normalised` are of defended arms.
    """
    return [
        {
            **_about(cell),
            "arm": arm,
            "main_performance": cell.result.numbers[arm]["main_performance"],
            "attack": grade["attack"],
            "knowledge": grade["knowledge"],
            "target": grade["target"],
            "attack_performance": grade["attack_performance"],
            "low": grade["interval"][0],
            "high": grade["interval"][1],
            "floor": grade["floor"],
            "positive_control": grade["positive_control"],
            "negative_control": grade["negative_control"],
            "verdict": grade["verdict"],
            "adaptive": grade["adaptive"],
            **_scores(cell, arm, number),
            "seconds": cell.result.cost[arm]["attack_seconds"][number],
        }
        for cell, arm in _arms(cells)
        if cell.result is not None
        for number, grade in enumerate(cell.result.numbers[arm]["attacks"])
    ]


def arm_rows(cells: Iterable[Cell]) -> list[Row]:
    """A row for each arm of each cell that is done: utility, what is promised, and what it cost."""
    return [
        {
            **_about(cell),
            "arm": arm,
            "metric": cell.result.numbers[arm]["metric"],
            "main_performance": cell.result.numbers[arm]["main_performance"],
            "chance": cell.result.numbers[arm]["chance"],
            "last_loss": (cell.result.numbers[arm]["losses"] or [None])[-1],
            "guarantee": "; ".join(g["statement"] for g in cell.result.numbers[arm]["guarantees"]),
            "total_bytes": cell.result.cost[arm]["total_bytes"],
            "messages": cell.result.cost[arm]["messages"],
            **{
                f"seconds_{k.replace(' ', '_')}": v
                for k, v in cell.result.cost[arm]["seconds"].items()
            },
            "numbers_hash": cell.result.numbers_hash,
        }
        for cell, arm in _arms(cells)
        if cell.result is not None
    ]


def trial_rows(cells: Iterable[Cell]) -> list[Row]:
    """A row for each training by which a defense was tuned."""
    return [
        {
            **_about(cell),
            "option": cell.tuned["option"],
            "value": trial["value"],
            "main_performance": trial["main_performance"],
            "target": cell.tuned["target"],
            "chosen": trial["value"] == cell.tuned["value"],
        }
        for cell in cells
        if cell.tuned is not None
        for trial in cell.tuned["trials"]
    ]


def failure_rows(cells: Iterable[Cell]) -> list[Row]:
    """A row for each cell that failed, or found no setting."""
    return [{**_about(cell), "error": cell.error} for cell in cells if cell.error]


def export(cells: Sequence[Cell], folder: str | Path, form: Format = "csv") -> list[Path]:
    """Write the rows into a folder, a file for each kind that has any: grades, arms, trials, failures.

    Raises:
        ExperimentError: pyarrow is not installed, or the folder cannot be written to.
    """
    if form == "parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ExperimentError("Parquet needs pyarrow: pip install pyarrow. Nothing was written.")
    tables = {
        "grades": grade_rows(cells),
        "arms": arm_rows(cells),
        "trials": trial_rows(cells),
        "failures": failure_rows(cells),
    }
    place, written = Path(folder), list[Path]()
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExperimentError(f"Nothing can be written to {place}: {error.strerror}.") from error
    for name, rows in tables.items():
        if not rows:
            continue
        path = place / f"{name}.{form}"
        with aside(path) as part:
            (_write_csv if form == "csv" else _write_parquet)(part, rows)
        written.append(path)
    return written


def _write_csv(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, _columns(rows))
        writer.writeheader()
        writer.writerows(rows)


def _write_parquet(path: Path, rows: Sequence[Row]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    columns = {name: [row.get(name) for row in rows] for name in _columns(rows)}
    parquet.write_table(pa.table(columns), path)


def _columns(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _about(cell: Cell) -> Row:
    e = cell.experiment
    return {
        "key": cell.key,
        **{f"axis:{name}": label for name, label in cell.labels.items()},
        "task": e.task.name,
        "model": e.model.name or e.model.config["model_type"],
        "partition": e.partition.kind,
        "head": e.partition.head,
        "tail": e.partition.tail,
        "defenses": " + ".join(spec.name for spec in e.defenses) or "none",
        "seed": e.seed,
    }


def _arms(cells: Iterable[Cell]) -> Iterator[tuple[Cell, str]]:
    for cell in cells:
        if cell.result is not None:
            yield from ((cell, arm) for arm in REFERENCES if arm in cell.result.numbers)


def _scores(cell: Cell, arm: str, number: int) -> Row:
    assert cell.result is not None  # whose rows these are
    scores = cell.result.numbers.get("dcs") if arm == "defended" else None
    if not scores:
        return {"dcs": None, "normalised": None}
    row = scores["per_attack"][number]
    return {"dcs": row["dcs"], "normalised": row["normalised"]}
