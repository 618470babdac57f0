"""One experiment at several cuts: how much an attack recovers the deeper the head goes, as a table and a plot."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
from attrs import frozen

from vflair_core.errors import ExperimentError
from vflair_core.experiments.attack_phase import REFERENCES
from vflair_core.experiments.experiment import Experiment
from vflair_core.experiments.output import aside, check_free, prove, remove_empty, remove_run
from vflair_core.experiments.result import Result
from vflair_core.experiments.run import run_sharing
from vflair_core.plugins import plugin_manager

if TYPE_CHECKING:
    import pluggy

Reporter = Callable[[str, int, int], None]


@frozen
class Recovery:
    """What one attack reached at one cut in one arm of an experiment."""

    head: int
    arm: str  # undefended or defended
    attack: str
    knowledge: str
    attack_performance: float
    interval: tuple[float, float]
    floor: float
    main_performance: float
    verdict: str  # "ok", or why the number says nothing about the cut
    reference: float  # what the attack reached here on the victims of the positive control
    positive_control: float | None  # and with the defense bypassed


def run_cuts(
    experiment: Experiment,
    heads: Sequence[int],
    out: str | Path,
    *,
    plugins: pluggy.PluginManager | None = None,
    report: Reporter = lambda *_: None,
    overwrite: bool = False,
    **options: Any,
) -> list[Recovery]:
    """Run `experiment` once for each number of head blocks, and write ``cuts.json`` and ``cuts.svg`` to `out`.

    Each run is an ordinary one, with all its files, in ``out/head-N``. An undefended fine-tuning that is equal at every
    depth is done at the first cut, and the others take over what it came to.

    Args:
        experiment: All but the cut.
        heads: Blocks that the data party keeps after the embeddings, one run for each.
        out: Folder to write to; it is made, and holds no run yet.
        plugins: As for `run`.
        report: As for `run`; phases begin with the cut.
        overwrite: Let the runs that `out` holds go away.
        options: Others of `run`.

    Raises:
        ExperimentError: There is no attack, no cut or the same twice, `out` cannot be written to, or matplotlib is not
            installed: nothing is run.
        VflairError: As `run`.
    """
    if not heads or len(set(heads)) < len(heads):
        raise ExperimentError(f"heads={list(heads)}: give each number of head blocks once.")
    if not experiment.attacks:
        raise ExperimentError(
            "The experiment has no [[attacks]], whose recovery could be compared."
        )
    if importlib.util.find_spec("matplotlib") is None:
        raise ExperimentError(
            "The plot needs matplotlib: pip install 'vflair-core[report]'. Nothing was run."
        )
    manager = plugins if plugins is not None else plugin_manager()
    cuts = [attrs.evolve(experiment.partition, head=head) for head in heads]
    made, rows = _place(Path(out), heads, overwrite=overwrite), list[Recovery]()
    try:
        with tempfile.TemporaryDirectory() as trained:
            for cut in cuts:

                def report_progress(
                    phase: str, done: int, total: int, head: int = cut.head
                ) -> None:
                    report(f"head {head}, {phase}", done, total)

                result = run_sharing(
                    Path(trained) if len(cuts) > 1 else None,
                    attrs.evolve(experiment, partition=cut),
                    plugins=manager,
                    report=report_progress,
                    out=Path(out) / f"head-{cut.head}",
                    **options,
                )
                rows += recoveries(result, cut.head)
    except BaseException as error:
        remove_empty(made)
        done = dict.fromkeys(f"head-{row.head}" for row in rows)
        if done:
            error.add_note(f"Cuts that were finished are in {out}: {', '.join(done)}.")
        raise
    with aside(Path(out) / "cuts.json") as part:
        part.write_text(json.dumps([attrs.asdict(row) for row in rows], indent=2))
    with aside(Path(out) / "cuts.svg") as part:
        draw(rows, part)
    return rows


def _place(out: Path, heads: Sequence[int], *, overwrite: bool) -> list[Path]:
    """Make the folder, remove the runs of before, and return the folders that were not there."""
    made = prove(out)
    try:
        check_free(out, [f"head-{head}" for head in heads], overwrite=overwrite)
    except ExperimentError:
        remove_empty(made)
        raise
    remove_run(out)
    return made


def recoveries(result: Result, head: int) -> list[Recovery]:
    """Return what each attack reached in a result, arm by arm."""
    return [
        Recovery(
            head=head,
            arm=arm,
            attack=grade["attack"],
            knowledge=grade["knowledge"],
            attack_performance=grade["attack_performance"],
            interval=tuple(grade["interval"]),
            floor=grade["floor"],
            main_performance=numbers["main_performance"],
            verdict=grade["verdict"],
            reference=grade["reference"],
            positive_control=grade["positive_control"],
        )
        for arm, numbers in result.numbers.items()
        if arm in REFERENCES
        for grade in numbers["attacks"]
    ]


def draw(rows: Sequence[Recovery], path: Path) -> Path:
    """Plot attack performance by cut: a line with its intervals for each attack and arm, and the highest floor.

    Points whose verdict is not ok are hollow, with a cross.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes: Any = figure.subplots()
    for arm, attack, knowledge in dict.fromkeys((r.arm, r.attack, r.knowledge) for r in rows):
        line = [r for r in rows if (r.arm, r.attack, r.knowledge) == (arm, attack, knowledge)]
        line.sort(key=lambda row: row.head)
        reached = [row.attack_performance for row in line]
        below = [max(row.attack_performance - row.interval[0], 0.0) for row in line]
        above = [max(row.interval[1] - row.attack_performance, 0.0) for row in line]
        drawn = axes.errorbar(
            [row.head for row in line],
            reached,
            yerr=(below, above),
            capsize=3,
            linestyle="-" if arm == "undefended" else "--",
            label=f"{attack} ({knowledge}), {arm}",
        )
        colour = drawn.lines[0].get_color()
        for row in line:
            sound = row.verdict == "ok"
            face = colour if sound else "white"
            axes.plot(row.head, row.attack_performance, "o", color=colour, markerfacecolor=face)
            if not sound:
                axes.plot(row.head, row.attack_performance, "x", color=colour, markersize=9)
    if any(row.verdict != "ok" for row in rows):
        hollow = {"marker": "o", "linestyle": "", "color": "gray", "markerfacecolor": "white"}
        axes.plot([], [], label="hollow: a control failed, or uninformative", **hollow)
    heads = sorted({row.head for row in rows})
    floors = [max(row.floor for row in rows if row.head == head) for head in heads]
    axes.plot(heads, floors, color="gray", linestyle=":", label="floor")
    axes.set(
        xlabel="blocks at the data party before the cut", ylabel="recovered (AP)", ylim=(0, 1.02)
    )
    axes.set_xticks(heads)
    axes.legend(fontsize="small")
    with rc_context({"svg.fonttype": "none"}):  # words stay words
        figure.savefig(path, format="svg")
    return path
