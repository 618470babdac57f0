"""The ``vflair`` program. Nothing here imports torch until a command needs it."""

from __future__ import annotations

import itertools
import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from vflair_core import __version__
from vflair_core.cli.tables import list_tasks, plain, say, summary, table
from vflair_core.errors import VflairError

app = App(name="vflair", version=__version__, help="Split learning of large language models.")

Plugin = Annotated[
    list[Path] | None, Parameter(name="--plugin", help="A one-file plugin; repeatable.")
]
Json = Annotated[bool, Parameter(name="--json", help="Print JSON.")]
Overrides = Annotated[
    list[str] | None, Parameter(name=["--override", "-o"], help="key=value in TOML; repeatable.")
]


@app.command
def run(
    file: Path,
    *,
    override: Overrides = None,
    plugin: Plugin = None,
    out: Annotated[
        Path | None, Parameter(help="Folder for the result; runs/NAME by default.")
    ] = None,
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
        Path | None, Parameter(help="Keep here what defenses prepare on public text.")
    ] = None,
    strict: Annotated[bool, Parameter(help="Stop when a watching plugin raises.")] = False,
    verbose: Annotated[bool, Parameter(help="Log every step.")] = False,
) -> None:
    """Run the experiment in FILE and write result.json, transcript.safetensors and experiment.toml."""
    _configure_logging(verbose=verbose)
    from vflair_core.cli import terminal
    from vflair_core.experiments.config import read_experiment
    from vflair_core.experiments.run import run as run_experiment
    from vflair_core.plugins import plugin_manager

    experiment = read_experiment(file, override or ())
    folder = out or Path("runs") / file.stem
    options: dict[str, Any] = {
        "plugins": plugin_manager(plugin or ()),
        "strict": strict,
        "keep_evidence": keep_evidence,
        "cache": cache,
    }
    if heads is not None:
        from vflair_core.experiments.cut_sweep import run_cuts

        with terminal.bars(quiet=json_) as progress:
            rows = run_cuts(experiment, _numbers(heads), folder, report=progress, **options)
        terminal.show_cuts(rows, folder, as_json=json_)
        return
    with terminal.bars(quiet=json_) as progress:
        result = run_experiment(experiment, report=progress, out=folder, **options)
    if json_:
        say(result.to_json())
    else:
        terminal.show_result(result, folder)


def _numbers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts):
        raise VflairError(f"--heads {text!r} is no list of whole numbers; write --heads 0,1,2.")
    return [int(part) for part in parts]


@app.command
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
    json_: Json = False,
) -> None:
    """Attack the evidence that `vflair run --keep-evidence` left in FOLDER, without running either party."""
    _configure_logging(verbose=False)
    from vflair_core.cli import terminal
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
    with terminal.bars(quiet=json_) as progress:
        grades = attack_again(
            folder, specs, plugins=plugin_manager(plugin or ()), device=device, report=progress
        )
    if json_:
        found = {arm: [grade.to_dict() for grade in each] for arm, each in grades.items()}
        say(json.dumps(found, indent=2))
    else:
        terminal.show_grades(grades)


@app.command
def plugins(*, plugin: Plugin = None, json_: Json = False) -> None:
    """List every plugin, where it came from, what it implements, and why it failed if it did."""
    import attrs

    from vflair_core.plugins import plugin_manager

    _configure_logging(verbose=False, level=logging.ERROR)
    infos = plugin_manager(plugin or ()).about()
    if json_:
        say(json.dumps([attrs.asdict(info) for info in infos], indent=2))
        return
    rows = [
        (info.name, f"{info.source} {info.version}".strip(), info.error or ", ".join(info.hooks))
        for info in infos
    ]
    table(("plugin", "from", "hooks, or why it failed"), rows)


@app.command(name="list")
def list_(what: str, *, plugin: Plugin = None, json_: Json = False) -> None:
    """List attacks, defenses, tasks or models (types that `verify` found exact)."""
    if what == "models":
        from vflair_core.parties.verified_models import VERIFIED

        if json_:
            say(json.dumps(VERIFIED, indent=2))
        else:
            types = [(kind, ", ".join(cuts)) for kind, cuts in VERIFIED.items()]
            table(("model type · task", "exact for"), types)
        return
    from vflair_core.plugins import offers, plugin_manager

    shelves = ("attacks", "defenses", "tasks", "commands")
    if what not in shelves:
        raise VflairError(f"Cannot list {what!r}. Possible: {', '.join(shelves)}, models.")
    found = offers(plugin_manager(plugin or ()), what)  # type: ignore[arg-type]
    if what == "tasks":
        list_tasks(found, json_=json_)
        return
    rows = [(name, offered.source, summary(offered.load())) for name, offered in found.items()]
    if json_:
        say(
            json.dumps(
                [dict(zip(("name", "from", "summary"), row, strict=True)) for row in rows], indent=2
            )
        )
    else:
        table(("name", "from", "what it does"), rows)


@app.command
def show(
    name: str,
    *,
    option: Annotated[
        list[str] | None,
        Parameter(name=["--option", "-o"], help="key=value of a task in TOML; repeatable."),
    ] = None,
    plugin: Plugin = None,
    json_: Json = False,
) -> None:
    """Show an attack, a defense or a task: options with types and defaults, source; of a task also an example."""
    from vflair_core.cli.catalogue import describe
    from vflair_core.experiments.config import override
    from vflair_core.plugins import plugin_manager

    options: dict[str, Any] = {}
    for each in option or ():
        override(options, each)
    facts = describe(plugin_manager(plugin or ()), name, options)
    if json_:
        say(json.dumps(facts, indent=2))
        return
    say(f"{facts['name']} ({facts['sort']}, from {facts['from']})\n\n{facts['text']}\n")
    if facts.get("knowledge"):
        say(f"needs: {', '.join(facts['knowledge']['needs']) or 'nothing'}")
        say(f"can use: {', '.join(facts['knowledge']['can use']) or 'nothing else'}\n")
    table(
        ("option", "type", "default"),
        [(o["name"], o["type"], o["default"]) for o in facts["options"]],
    )
    for part in ("card", "example"):
        if facts.get(part):
            say("")
            table((part, ""), [(key, plain(value)) for key, value in facts[part].items()])


@app.command
def explain(
    file: Path, *, override: Overrides = None, plugin: Plugin = None, json_: Json = False
) -> None:
    """Say what an experiment sends across the cut: tensors, roles, bytes, and who owns each weight."""
    _configure_logging(verbose=False)
    from vflair_core.experiments.config import read_experiment
    from vflair_core.experiments.explain import explain as explain_experiment
    from vflair_core.plugins import plugin_manager

    facts = explain_experiment(read_experiment(file, override or ()), plugin_manager(plugin or ()))
    if json_:
        say(json.dumps(facts, indent=2))
        return
    columns = ("message", "direction", "tensor", "role", "dtype", "shape", "bytes")
    table(columns, [tuple(str(row[c]) for c in columns) for row in facts["crossings"]])
    table(("weight", "owner"), list(facts["owners"].items()))
    for note in facts["notes"]:
        say(f"• {note}")


@app.command
def merge(
    data: Path,
    *model: Path,
    out: Annotated[Path, Parameter(help="A new folder.")],
    adapter: Annotated[
        bool, Parameter(help="Write one peft adapter instead of merging it into the weights.")
    ] = False,
    base: Annotated[
        str | None, Parameter(help="What adapters were trained on, if not what was loaded.")
    ] = None,
    json_: Json = False,
) -> None:
    """Join what the data party saved in DATA and the model parties in MODEL … into one Hugging Face checkpoint."""
    _configure_logging(verbose=False)
    from transformers.utils import logging as transformers_logging

    from vflair_core.parties.merge import merge as merge_parts

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    folder = merge_parts(data, model, out, adapter=adapter, base=base)
    files = sorted(path.name for path in folder.iterdir())
    if json_:
        say(json.dumps({"out": str(folder), "files": files}, indent=2))
    else:
        say(f"{folder}: {', '.join(files)}")


def main() -> None:
    """Run the program; an error of ours is one message, not a traceback."""
    try:
        _add_plugin_commands(sys.argv[1:])
        app()
    except VflairError as error:
        sys.stderr.write(f"vflair: {error}\n")
        sys.exit(1)


def _add_plugin_commands(arguments: list[str]) -> None:
    """Plugins' commands are looked up only for help, and where the core has no command of that name."""
    name = next((word for word in arguments if not word.startswith("-")), "")
    if name in {"run", "attack", "plugins", "list", "show", "explain", "merge"}:
        return
    from vflair_core.plugins import find, offers, plugin_manager

    after = itertools.pairwise(arguments)
    _configure_logging(verbose=False, level=logging.ERROR)
    manager = plugin_manager([value for flag, value in after if flag == "--plugin"])
    offered = [find(manager, "commands", name)] if name else offers(manager, "commands").values()
    for command in offered:
        app.command(command.load(), name=command.name)


def _configure_logging(*, verbose: bool, level: int = logging.WARNING) -> None:
    import structlog

    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG if verbose else level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


if __name__ == "__main__":
    main()
