"""Commands of results that others can check: submit, verify-result, leaderboard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from vflair_core.cli.app import Json, NoPlugin, Plugin, configure_logging, leave_out
from vflair_core.cli.tables import say, table
from vflair_core.errors import VflairError


def submit(
    db: Path,
    *,
    out: Annotated[Path, Parameter(help="The file to write, JSON.")],
    title: Annotated[str, Parameter(help="What it shows, in a line.")],
    by: Annotated[str, Parameter(help="Who made it.")],
    plugin: Plugin = None,
    no_plugin: NoPlugin = None,
) -> None:
    """Write what the study DB found as one file that others can check, if it keeps the rules of the leaderboard."""
    leave_out(no_plugin)
    configure_logging(verbose=False)
    from vflair_core.experiments.studies.submission import submit as write_submission

    content = write_submission(db, out, title=title, by=by, plugins=plugin or ())
    say(
        f"{out}: {len(content['cells'])} cells, {out.stat().st_size / 1e6:.1f} MB, no private text."
    )


def verify_result(
    file: Path,
    *,
    db: Annotated[
        Path | None,
        Parameter(help="The store of the second run; runs/NAME-again/study.db by default."),
    ] = None,
    cells: Annotated[
        int, Parameter(help="How many cells to run, spread over all; 0 runs all.")
    ] = 0,
    workers: Annotated[int, Parameter(help="Processes that work at a time.")] = 1,
    trust: Annotated[
        bool, Parameter(help="Run the code that the submission brings: it is somebody else's.")
    ] = False,
    json_: Json = False,
) -> None:
    """Check the submission in FILE, run it again, and compare: bit for bit with the same versions, else within the intervals."""
    configure_logging(verbose=False)
    import attrs

    from vflair_core.cli.progress import progress
    from vflair_core.experiments.studies.verification import verify_result as verify

    place = db or Path("runs") / f"{file.stem}-again" / "study.db"
    with progress(quiet=json_) as report:
        verdicts = verify(file, place, cells=cells, trust=trust, workers=workers, report=report)
    if json_:
        say(json.dumps([attrs.asdict(each) for each in verdicts], indent=2))
    else:
        axes = list(dict.fromkeys(name for each in verdicts for name in each.labels))
        rows = [
            (
                *(each.labels.get(axis, "–") for axis in axes),
                each.verdict,
                " ".join(each.differences),
            )
            for each in verdicts
        ]
        table((*axes, "verdict", "differences"), rows)
    if differing := [each for each in verdicts if each.verdict == "differs"]:
        raise VflairError(
            f"{len(differing)} of {len(verdicts)} cells differ from what was submitted."
        )


def leaderboard(
    folder: Path,
    *,
    out: Annotated[
        Path | None, Parameter(help="The page to write; by default it is printed.")
    ] = None,
) -> None:
    """Make the page of all submissions in FOLDER, as Markdown."""
    configure_logging(verbose=False)
    from vflair_core.experiments.studies.leaderboard import leaderboard as page_of

    page = page_of(folder)
    if out is None:
        say(page)
    else:
        out.write_text(page, encoding="utf-8")
        say(str(out))
