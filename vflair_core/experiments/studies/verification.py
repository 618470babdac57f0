"""Run a submission again, and compare: bit for bit with the same versions, within our own intervals with others."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from vflair_core.errors import ExperimentError
from vflair_core.experiments.attack_phase import REFERENCES
from vflair_core.experiments.config import experiment_from
from vflair_core.experiments.studies.assembly import read_environments
from vflair_core.experiments.studies.cell import Cell
from vflair_core.experiments.studies.grid import Plan
from vflair_core.experiments.studies.rules import Entry, Rules
from vflair_core.experiments.studies.study import study
from vflair_core.experiments.studies.submission import read_submission

UTILITY = 0.05  # how far main performance may differ under other versions


@frozen
class Verdict:
    """What running a cell of a submission again came to.

    Attributes:
        labels: What the cell is on each axis.
        verdict: equal: bit for bit; alike: other versions, within the intervals; differs.
        differences: What differs.
    """

    labels: Mapping[str, str]
    verdict: str
    differences: tuple[str, ...] = ()


def verify_result(
    path: str | Path,
    db: str | Path,
    *,
    cells: int = 0,
    trust: bool = False,
    rules: Rules | None = None,
    **options: Any,
) -> list[Verdict]:
    """Run the cells of a submission again and compare.

    With the same versions and plugins numbers must be equal, bit for bit; with others each attack's rate must lie in the
    interval that is found here, and main performance may differ by `UTILITY`.

    Args:
        path: The submission.
        db: The store of the second run.
        cells: How many cells to run, spread over all; 0 runs all.
        trust: Run the one-file plugins that the submission brings: they are somebody else's code.
        rules: What it must have.
        options: Others of `study`.

    Raises:
        ExperimentError: It does not keep the rules, or brings code that is not trusted.
    """
    if cells < 0:
        raise ExperimentError(f"cells = {cells}: give 0 for all, or how many.")
    content = read_submission(path, rules)
    if content["plugins"] and not trust:
        raise ExperimentError(
            f"{path} brings code: {', '.join(content['plugins'])}. Read it, then let it run with --trust (trust=True)."
        )
    place = Path(db).with_name(f"{Path(db).stem}.plugins")
    for name, text in content["plugins"].items():
        place.mkdir(parents=True, exist_ok=True)
        (place / Path(name).name).write_text(text, encoding="utf-8")
    files = [place / Path(name).name for name in content["plugins"]]
    chosen = content["cells"]
    if cells and cells < len(chosen):
        chosen = [chosen[row * len(chosen) // cells] for row in range(cells)]
    plans = [Plan(entry["labels"], experiment_from(entry["experiment"])) for entry in chosen]
    again = study(plans, db, plugins=files, **options)
    environments = read_environments(db)
    return [
        _compared(entry, cell, environment)
        for entry, cell, environment in zip(chosen, again, environments, strict=True)
    ]


def _compared(entry: Entry, cell: Cell, environment: Mapping[str, Any]) -> Verdict:
    if cell.result is None:
        return Verdict(cell.labels, "differs", (f"it failed here: {cell.error}",))
    if cell.result.numbers_hash == entry["numbers_hash"]:
        return Verdict(cell.labels, "equal")
    same = all(
        environment[k] == entry["environment"][k]
        for k in ("versions", "sources", "deciding", "model", "files")
    )
    if same:
        told = tuple(
            _differences(entry["numbers"], json.loads(cell.result.to_json())["numbers"], "")
        )
        return Verdict(cell.labels, "differs", told)
    told = tuple(_beyond(entry["numbers"], cell.result.numbers))
    other = tuple(_others(entry["environment"], environment))
    return Verdict(cell.labels, "differs" if told else "alike", (*told, *other))


def _others(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    """What else the numbers were made by."""
    for name in ("versions", "sources", "deciding", "files"):
        for key in sorted({*there[name], *here[name]}):
            old, new = there[name].get(key, "nothing"), here[name].get(key, "nothing")
            if old != new:
                yield f"{key}: {old} there, {new} here."
    if there["model"] != here["model"]:
        yield "The model's files are others."


def _differences(old: Any, new: Any, where: str) -> Iterator[str]:
    """Where two results differ, down to single values."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys((*old, *new)):
            yield from _differences(old.get(key), new.get(key), f"{where}.{key}".lstrip("."))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from _differences(one, other, f"{where}[{number}]")
    elif old != new:
        yield f"{where}: {old} there, {new} here."


def _beyond(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """What differs by more than its uncertainty."""
    for arm in (arm for arm in REFERENCES if arm in old):
        if arm not in new:
            yield f"{arm}: not run here."
            continue
        mains = old[arm]["main_performance"], new[arm]["main_performance"]
        if abs(mains[0] - mains[1]) > UTILITY:
            yield f"{arm}: main performance is {mains[0]:.3f} there, {mains[1]:.3f} here."
        if len(old[arm]["attacks"]) != len(new[arm]["attacks"]):
            yield f"{arm}: other grades there than here."
            continue
        for one, other in zip(old[arm]["attacks"], new[arm]["attacks"], strict=True):
            rates = one["attack_performance"], other["attack_performance"]
            if not other["interval"][0] <= rates[0] <= other["interval"][1]:
                name = f"{one['attack']} ({one['knowledge']})"
                yield f"{arm}, {name}: {rates[0]:.3f} there, {rates[1]:.3f} here."
