"""What decides the numbers of a cell beside its experiment: versions, plugins, and the content of every file it names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from vflair_core.attacks.isolation import attack_device
from vflair_core.experiments.experiment import Experiment, Named
from vflair_core.experiments.result import versions
from vflair_core.hookspecs import Decide
from vflair_core.offers import find
from vflair_core.parties.checkpoint_files import locate_checkpoint

if TYPE_CHECKING:
    from vflair_core.plugins import PluginManager

Environment = Mapping[str, Any]
Used = Iterable[tuple[str, Named]]  # things by their shelf: tasks, defenses, attacks


def environment_of(e: Experiment, manager: PluginManager) -> dict[str, Any]:
    """What decides the numbers of an experiment beside itself.

    Versions of what computes; the distribution and version behind each thing that is used, of a plugin in one file its
    content; the same of plugins that answer a question of the core, like where to cut; the content of the model's
    files and of each file that an option names; and the device of attacks. What is read from the hub is named by its name.

    Raises:
        PluginError: No plugin offers something.
        CheckpointError: The model's package is not installed.
    """
    used = [*of_arm(e), *(("attacks", spec) for spec in e.attacks)]
    files = {path: _content(Path(path)) for _, spec in used for path in _paths(spec.options)}
    return {
        "versions": versions(),
        "sources": {
            f"{shelf}:{spec.name}": _offered(manager, shelf, spec.name) for shelf, spec in used
        },
        "deciding": _deciding(manager),
        "model": _model_files(e),
        "files": files,
        "device": str(attack_device(e.attack_device)),
        "plugins": [attrs.asdict(info) for info in manager.about()],
    }


def of_arm(e: Experiment) -> list[tuple[str, Named]]:
    """The things that an arm uses."""
    used: list[tuple[str, Named]] = [
        ("tasks", e.task),
        *(("defenses", spec) for spec in e.defenses),
    ]
    return used + ([("attacks", e.adversary)] if e.adversary is not None else [])


def behind(environment: Environment, used: Used) -> list[Any]:
    """What decides the numbers of a piece that uses these things, beside its experiment."""
    each = list(used)
    sources = {
        f"{shelf}:{spec.name}": environment["sources"][f"{shelf}:{spec.name}"]
        for shelf, spec in each
    }
    files = {
        path: environment["files"].get(path)
        for _, spec in each
        for path in _paths(spec.options, environment)
    }
    common = [environment[name] for name in ("versions", "deciding", "model")]
    return [*common, sources, files]


def hashed(value: Any) -> str:
    """A name for a value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=list).encode()).hexdigest()[:24]


def _offered(manager: PluginManager, shelf: Any, name: str) -> str:
    source = find(manager, shelf, name).source
    version = next((v for s, v in manager.sources.values() if s == source), "")
    return _source(source, version)


def _source(source: str, version: str) -> str:
    """A distribution with its version; of a plugin in one file, its content."""
    if source.endswith(".py") and Path(source).is_file():
        return f"file {_content(Path(source))[:16]}"
    return f"{source} {version}".strip()


def _deciding(manager: PluginManager) -> dict[str, str]:
    """The plugins that answer questions of the core, and what they are."""
    questions = {name for name in vars(Decide) if name.startswith("vflair_")}
    answering = [info for info in manager.about() if questions & set(info.hooks)]
    return {info.name: _source(info.source, info.version) for info in answering}


# -- files ------------------------------------------------------------------------------------------------------


def _model_files(e: Experiment) -> str:
    """The content of a model that lies on this machine, its config and tokenizer too; of one of the hub, its name says it."""
    if not e.model.name:
        return ""
    place = Path(locate_checkpoint(e.model.name, gguf_file=e.model.gguf_file))
    return _content(place) if place.is_dir() else ""


def _paths(options: Any, environment: Environment | None = None) -> Iterator[str]:
    """The values of options that name a file or the folder of a model; of a study that is read, those that did."""
    if isinstance(options, Mapping):
        options = list(options.values())
    if isinstance(options, (list, tuple)):
        for value in options:
            yield from _paths(value, environment)
    elif isinstance(options, str) and _names_file(options, environment):
        yield options


def _names_file(text: str, environment: Environment | None) -> bool:
    if environment is not None:
        return text in environment["files"]
    if not text or len(text) > 1024 or "\0" in text:
        return False
    try:
        return Path(text).is_file() or Path(text, "config.json").is_file()
    except OSError:  # no name of a file
        return False


def _content(place: Path) -> str:
    """A digest of a file, or of all files in a folder by their names."""
    if place.is_file():
        facts = place.stat()
        return _file_digest(place.resolve(), facts.st_size, facts.st_mtime_ns)
    digest = hashlib.sha256()
    for file in sorted(each for each in place.rglob("*") if each.is_file()):
        digest.update(f"{file.relative_to(place).as_posix()}\0{_content(file)}\0".encode())
    return digest.hexdigest()


@cache
def _file_digest(file: Path, _size: int, _changed: int) -> str:
    """Read once, as long as it does not change."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
