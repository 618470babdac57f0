"""A result that others can check: one file with what was run, what was found and where it came from, and the rules that it keeps."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vflair_core.errors import ExperimentError
from vflair_core.experiments.output import aside
from vflair_core.experiments.studies.assembly import read_environments, read_study
from vflair_core.experiments.studies.cell import Cell
from vflair_core.experiments.studies.pieces import cell_key
from vflair_core.experiments.studies.rules import Entry, Rules, digest_of, problems

FORMAT = 1


def submit(
    db: str | Path,
    out: str | Path,
    *,
    title: str,
    by: str,
    plugins: Iterable[str | Path] = (),
    rules: Rules | None = None,
) -> dict[str, Any]:
    """Write what a study found as one file that others can check and run again; return its content.

    Nothing private is in it: no text, no sample, no weight. The code of one-file plugins is.

    Args:
        db: The study.
        out: The file, JSON.
        title: What it shows, in a line.
        by: Who made it.
        plugins: The one-file plugins that it was run with.
        rules: What it must have.

    Raises:
        ExperimentError: It does not keep the rules, with all that is wrong, or cannot be written.
    """
    cells, environments = read_study(db), read_environments(db)
    missing = [cell for cell in cells if cell.result is None and not cell.without_setting]
    if missing:
        why = next((f": {cell.error}" for cell in missing if cell.error), "")
        raise ExperimentError(
            f"{len(missing)} of {len(cells)} cells of {db} are not done{why}. Run the study to its end, then submit it."
        )
    files = [Path(file) for file in plugins]
    content: dict[str, Any] = {
        "format": FORMAT,
        "title": title,
        "by": by,
        "made": dt.datetime.now(dt.UTC).date().isoformat(),
        "plugins": {file.name: _code(file) for file in files},
        "cells": [
            _entry(cell, environment)
            for cell, environment in zip(cells, environments, strict=True)
            if cell.result is not None
        ],
        "without_setting": [
            {"labels": dict(cell.labels), "tuned": cell.tuned}
            for cell in cells
            if cell.without_setting
        ],
    }
    content["digest"] = digest_of(content)
    if wrong := problems(content, rules or Rules()):
        raise ExperimentError(_told(f"{db} cannot be submitted", wrong))
    with aside(Path(out)) as part:
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    Path(out).chmod(0o644)  # it is for others
    return content


def read_submission(path: str | Path, rules: Rules | None = None) -> dict[str, Any]:
    """Read a submission that keeps the rules.

    Raises:
        ExperimentError: It cannot be read, is none, or does not keep them.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ExperimentError(f"{path} cannot be read: {error}.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ExperimentError(
            f"{path} is no submission of format {FORMAT}; `vflair submit` makes one."
        )
    if wrong := problems(content, rules or Rules()):
        raise ExperimentError(_told(f"{path} does not keep the rules", wrong))
    return content


def _code(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ExperimentError(f"The plugin {file} cannot be read: {error}.") from error


def _entry(cell: Cell, environment: Mapping[str, Any]) -> Entry:
    assert cell.result is not None  # it is done
    return {
        "key": cell_key(cell.experiment, environment),
        "labels": dict(cell.labels),
        "experiment": cell.experiment.to_dict(),
        "tuned": cell.tuned,
        "environment": {k: v for k, v in environment.items() if k != "plugins"},
        "task": cell.result.task,
        "numbers": cell.result.numbers,
        "numbers_hash": cell.result.numbers_hash,
        "cost": cell.result.cost,
        "hits": {arm: [grade.hits for grade in grades] for arm, grades in cell.grades.items()},
    }


def _told(what: str, wrong: Sequence[str]) -> str:
    return f"{what}:\n" + "\n".join(f"  {each}" for each in wrong)
