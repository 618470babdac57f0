"""The program `vflair`: its commands, and its errors as one message."""

from __future__ import annotations

import itertools
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from vflair_core.cli.app import Json, app, configure_logging, own_choice, own_logging
from vflair_core.cli.credentials import tls, token
from vflair_core.cli.doctor import doctor
from vflair_core.cli.experiments import attack, explain, run
from vflair_core.cli.new_plugin import new_plugin
from vflair_core.cli.plugins import list_, plugins, show
from vflair_core.cli.serve import serve
from vflair_core.cli.studies import export, report, study
from vflair_core.cli.submissions import leaderboard, submit, verify_result
from vflair_core.cli.tables import say
from vflair_core.errors import PluginError, VflairError, alternatives


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
    configure_logging(verbose=False)
    from transformers.utils import logging as transformers_logging

    from vflair_core.parties.merge import merge as merge_parts

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    folder = merge_parts(data, model, out, adapter=adapter, base=base)
    files = sorted(path.name for path in folder.iterdir())
    if json_:
        say(json.dumps({"out": str(folder), "files": files}, indent=2))
    else:
        say(f"{folder}: {', '.join(files)}")


COMMANDS: dict[str, Callable[..., None]] = {
    "run": run,
    "attack": attack,
    "explain": explain,
    "study": study,
    "export": export,
    "report": report,
    "submit": submit,
    "verify-result": verify_result,
    "leaderboard": leaderboard,
    "new-plugin": new_plugin,
    "plugins": plugins,
    "list": list_,
    "show": show,
    "merge": merge,
    "serve": serve,
    "doctor": doctor,
}
for _name, _command in COMMANDS.items():
    app.command(_command, name=_name)
GROUPS: dict[str, App] = {"tls": tls, "token": token}  # commands that have commands
for _group in GROUPS.values():
    app.command(_group)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program on `arguments`, by default those it was called with; an error of ours or of a file is one message."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        with own_logging(), own_choice():
            _add_plugin_commands(words)
            app(words)
    except VflairError as error:
        _end(str(error), error, 1)
    except KeyboardInterrupt as stop:
        _end("interrupted.", stop, INTERRUPTED)
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        _end(" ".join(str(error).split()), error, 1)


INTERRUPTED = 130  # what a shell says of a program that Ctrl-C ended


def _end(message: str, error: BaseException, code: int) -> None:
    """Say why the program ends, and what is left of a run."""
    sys.stderr.write(f"vflair: {' '.join([message, *getattr(error, '__notes__', ())])}\n")
    sys.exit(code)


def _add_plugin_commands(arguments: list[str]) -> None:
    """Plugins' commands are looked up only for help, and where the core has no command of that name."""
    name = next((word for word in arguments if not word.startswith("-")), "")
    if name in COMMANDS or name in GROUPS:
        return
    from vflair_core.offers import find, offers
    from vflair_core.plugins import plugin_manager

    after = itertools.pairwise(arguments)
    configure_logging(verbose=False, level=logging.ERROR)
    manager = plugin_manager([value for flag, value in after if flag == "--plugin"])
    try:
        offered = (
            [find(manager, "commands", name)] if name else offers(manager, "commands").values()
        )
    except PluginError as error:
        ours = alternatives(name, [*COMMANDS, *GROUPS], label="Commands of vflair itself")
        raise PluginError(f"{error}{ours}") from error
    for command in offered:
        app.command(command.load(), name=command.name)


if __name__ == "__main__":
    main()
