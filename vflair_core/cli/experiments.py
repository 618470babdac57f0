"""Commands that run experiments: run, attack, explain."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from vflair_core.cli.app import Json, NoPlugin, Overrides, Plugin, configure_logging, leave_out
from vflair_core.cli.tables import say, table
from vflair_core.errors import VflairError


def run(
    file: Path,
    *,
    override: Overrides = None,
    plugin: Plugin = None,
    no_plugin: NoPlugin = None,
    out: Annotated[
        Path | None, Parameter(help="Folder for the result; runs/NAME by default.")
    ] = None,
    overwrite: Annotated[
        bool, Parameter(help="Let the run that the folder holds go away first.")
    ] = False,
    heads: Annotated[
        str | None,
        Parameter(
            help="Run once for each of these cuts, e.g. 0,1,2,4, and plot what is recovered."
        ),
    ] = None,
    json_: Json = False,
    keep_evidence: Annotated[
        bool,
        Parameter(help="Keep messages, weights and the truth of each arm, for `vflair attack`."),
    ] = False,
    cache: Annotated[
        Path | None, Parameter(help="Keep here the public phase, and what defenses prepare.")
    ] = None,
    strict: Annotated[bool, Parameter(help="Stop when a watching plugin raises.")] = False,
    verbose: Annotated[
        bool, Parameter(help="Log every step, and say all there is to say of the result.")
    ] = False,
) -> None:
    """Run the experiment in FILE and write result.json, transcript.safetensors and experiment.toml."""
    leave_out(no_plugin)
    configure_logging(verbose=verbose, level=logging.INFO)
    from vflair_core.cli import terminal
    from vflair_core.cli.progress import progress
    from vflair_core.experiments.config import read_experiment
    from vflair_core.experiments.run import run as run_experiment
    from vflair_core.plugins import plugin_manager

    experiment = read_experiment(file, override or ())
    folder = out or Path("runs") / file.stem
    options: dict[str, Any] = {
        "plugins": plugin_manager(plugin or ()),
        "overwrite": overwrite,
        "strict": strict,
        "keep_evidence": keep_evidence,
        "cache": cache,
    }
    if heads is not None:
        from vflair_core.experiments.cut_sweep import run_cuts

        with progress(quiet=json_) as report:
            rows = run_cuts(experiment, _numbers(heads), folder, report=report, **options)
        terminal.show_cuts(rows, folder, as_json=json_)
        return
    with progress(quiet=json_) as report:
        result = run_experiment(experiment, report=report, out=folder, **options)
    if json_:
        say(result.to_json())
    else:
        terminal.show_result(result, folder, verbose=verbose)


def _numbers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts):
        raise VflairError(f"--heads {text!r} is no list of whole numbers; write --heads 0,1,2.")
    return [int(part) for part in parts]


def attack(
    folder: Path,
    *names: str,
    knowledge: Annotated[
        list[str] | None, Parameter(help="A preset or a name of the vocabulary; repeatable.")
    ] = None,
    option: Annotated[
        list[str] | None,
        Parameter(name=["--option", "-o"], help="key=value of the attacks in TOML; repeatable."),
    ] = None,
    device: Annotated[
        str, Parameter(help="Where models compute: cpu, cuda, cuda:1; auto is CUDA if it is there.")
    ] = "auto",
    plugin: Plugin = None,
    no_plugin: NoPlugin = None,
    json_: Json = False,
) -> None:
    """Attack the evidence that `vflair run --keep-evidence` left in FOLDER, without running either party."""
    leave_out(no_plugin)
    configure_logging(verbose=False)
    from vflair_core.cli import terminal
    from vflair_core.cli.progress import progress
    from vflair_core.experiments.attack_phase import attack_again
    from vflair_core.experiments.config import override
    from vflair_core.experiments.experiment import AttackSpec
    from vflair_core.plugins import plugin_manager

    options: dict[str, Any] = {}
    for each in option or ():
        override(options, each)
    specs = [AttackSpec(name, options, tuple(knowledge or ("K4",))) for name in names]
    if not specs:
        raise VflairError("Name one or more attacks; `vflair list attacks` shows what there is.")
    with progress(quiet=json_) as report:
        grades = attack_again(
            folder, specs, plugins=plugin_manager(plugin or ()), device=device, report=report
        )
    if json_:
        rows = {arm: [grade.to_dict() for grade in each] for arm, each in grades.items()}
        say(json.dumps(rows, indent=2))
    else:
        terminal.show_grades(grades)


def explain(
    file: Path,
    *,
    override: Overrides = None,
    plugin: Plugin = None,
    no_plugin: NoPlugin = None,
    weights: Annotated[bool, Parameter(help="List every weight with its owner and shape.")] = False,
    json_: Json = False,
) -> None:
    """Say what an experiment sends across the cut: tensors, roles, shapes, bytes, and how much each party holds."""
    leave_out(no_plugin)
    configure_logging(verbose=False)
    from vflair_core.experiments.config import read_experiment
    from vflair_core.experiments.explain import explain as explain_experiment
    from vflair_core.plugins import plugin_manager

    facts = explain_experiment(read_experiment(file, override or ()), plugin_manager(plugin or ()))
    if json_:
        say(json.dumps(facts, indent=2))
        return
    columns = ("message", "direction", "tensor", "role", "dtype", "shape", "bytes")
    rows = [tuple(str(row[c]) for c in columns) for row in facts["crossings"]]
    table(columns, rows, whole=("tensor", "shape"))
    say("")
    totals = [
        (party, str(held["weights"]), f"{held['parameters']:,}", f"{held['bytes'] / 1e6:.1f}")
        for party, held in facts["totals"].items()
    ]
    table(("holds", "weights", "parameters", "MB"), totals)
    if weights:
        say("")
        shapes = facts["shapes"]
        rows = [(name, owner, str(shapes[name])) for name, owner in facts["owners"].items()]
        table(("weight", "owner", "shape"), rows)
    say("")
    for note in facts["notes"]:
        say(f"• {note}")
