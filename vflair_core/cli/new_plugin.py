"""The command that begins a plugin: a package with an attack, a defense or a task, its tests and its CI."""

from __future__ import annotations

import importlib.util
import keyword
import re
import tempfile
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Annotated

from cyclopts import Parameter

from vflair_core.cli.tables import say
from vflair_core.errors import VflairError

TEMPLATE = files("vflair_core.cli") / "plugin_template"
PARTS = {"attack": "Attack", "defense": "RoundedStates", "task": "meetings"}  # and what each offers
PLURAL = {"attack": "an attack", "defense": "a defense", "task": "a task"}
OURS = {  # what an experiment takes where the plugin has none of its own, and which package has it
    "attack": ("nearest-embedding", "vflair-attacks"),
    "defense": ("gaussian-noise", "vflair-defenses"),
    "task": ("python-manual", "vflair-tasks"),
}
TAKEN = {"core", "attacks", "defenses", "tasks", "flower", "nvflare"}
FILES = {  # beside those of the parts
    "pyproject.toml": "pyproject.toml.txt",
    "README.md": "README.md.txt",
    ".gitignore": "gitignore.txt",
    ".github/workflows/tests.yml": "ci.yml.txt",
    "experiment.toml": "experiment.toml.txt",
    "study.toml": "study.toml.txt",
    "tests/test_experiment.py": "test_experiment.py.txt",
}


def new_plugin(
    name: str,
    *,
    attack: Annotated[bool, Parameter(negative=(), help="Begin an attack.")] = False,
    defense: Annotated[bool, Parameter(negative=(), help="Begin a defense.")] = False,
    task: Annotated[bool, Parameter(negative=(), help="Begin a task.")] = False,
    out: Annotated[
        Path | None, Parameter(help="The folder to make; vflair-NAME here by default.")
    ] = None,
) -> None:
    """Begin a plugin called NAME: a package with its tests, an experiment and CI; without a choice it has one of each."""
    asked = {"attack": attack, "defense": defense, "task": task}
    parts = [part for part in PARTS if asked[part]] or list(PARTS)
    name = checked_name(name)
    folder = out or Path(f"vflair-{name}")
    if folder.exists() or folder.is_symlink():
        raise VflairError(f"{folder} is there already: give another NAME or --out.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".vflair-", dir=folder.parent) as aside:
        whole = Path(aside, "whole")
        for path, text in written(name, parts):
            (whole / path).parent.mkdir(parents=True, exist_ok=True)
            (whole / path).write_text(text)
        whole.rename(folder)
    say(
        f"{folder}: {_listed([PLURAL[each] for each in parts])}.\n\n"
        f'  cd {folder}\n  pip install -e ".[tests]"\n  pytest\n  vflair plugins\n  vflair run experiment.toml'
    )


def checked_name(name: str) -> str:
    """The name of a plugin without ``vflair-`` in front.

    Raises:
        VflairError: It is none, or taken.
    """
    short = name.removeprefix("vflair-")
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", short) or keyword.iskeyword(short):
        raise VflairError(
            f"{name!r} cannot be the name of a plugin: use small letters, digits and single hyphens, as in "
            "'word-shuffle'."
        )
    module = f"vflair_{short.replace('-', '_')}"
    if short in TAKEN or importlib.util.find_spec(module) is not None:
        raise VflairError(
            f"There is a plugin called {short!r} already (module {module}): choose another name."
        )
    return short


def written(name: str, parts: list[str]) -> Iterator[tuple[str, str]]:
    """Each file of a plugin that offers these parts, by its path in the folder."""
    module = f"vflair_{name.replace('-', '_')}"
    own = {part: f"{name}-{part}" for part in parts}
    needs = ["vflair-core>=0.1", *(f"{OURS[part][1]}>=0.1" for part in PARTS if part not in parts)]
    words = {part: own.get(part, OURS[part][0]) for part in PARTS} | {
        "name": name,
        "module": module,
        "distribution": f"vflair-{name}",
        "what": _listed([PLURAL[part] for part in parts]).capitalize(),
        "offers": ", ".join(f"`{each}`" for each in own.values()),
        "needs": ", ".join(f'"{each}"' for each in needs),
    }
    for path, file in FILES.items():
        yield path, _filled(file, words)
    for part in parts:
        yield f"{module}/{part}.py", _filled(f"{part}.py.txt", words)
        yield f"tests/test_{part}.py", _filled(f"test_{part}.py.txt", words)
    hooks = [
        f'@hookimpl\ndef vflair_{part}s():\n    return {{"{own[part]}": "{module}.{part}:{PARTS[part]}"}}\n'
        for part in parts
    ]
    head = f'"""{words["what"]} for vflair. What is named here is imported when somebody uses it."""\n\n'
    sign = f"{head}from vflair_core import hookimpl\n\nVFLAIR_API = 1\n\n\n"
    yield f"{module}/__init__.py", sign + "\n\n".join(hooks)
    yield f"{module}/py.typed", ""


def _listed(words: list[str]) -> str:
    """``a, b and c``."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _filled(file: str, words: dict[str, str]) -> str:
    return Template((TEMPLATE / file).read_text()).substitute(words)
