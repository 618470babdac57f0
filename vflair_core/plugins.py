"""Finding plugins and asking them. A manager is a value: make one, pass it on, never share it globally.

Entry points are loaded one by one. A plugin that cannot be imported is remembered with its reason, shown
by ``vflair plugins``, and breaks nothing else.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pluggy
import structlog
from attrs import frozen

from vflair_core.errors import PluginError, did_you_mean
from vflair_core.hookspecs import KINDS, PROJECT

log = structlog.get_logger()

Shelf = Literal["attacks", "defenses", "tasks", "commands"]


@frozen
class PluginInfo:
    """One plugin as ``vflair plugins`` shows it; `error` is set when it could not be loaded."""

    name: str
    source: str
    version: str = ""
    hooks: tuple[str, ...] = ()
    error: str | None = None


class PluginManager(pluggy.PluginManager):
    """A pluggy manager that also remembers where each plugin came from and which ones failed."""

    def __init__(self) -> None:
        super().__init__(PROJECT)
        self.sources: dict[str, tuple[str, str]] = {}
        self.failures: list[PluginInfo] = []

    def about(self) -> list[PluginInfo]:
        """Describe every plugin, loaded or not."""
        loaded = [
            PluginInfo(
                name,
                *self.sources.get(name, ("registered by hand", "")),
                hooks=tuple(sorted(caller.name for caller in self.get_hookcallers(plugin) or ())),
            )
            for name, plugin in self.list_name_plugin()
            if plugin is not None
        ]
        return loaded + self.failures


def plugin_manager(
    files: Iterable[str | Path] = (), *, entry_point_group: str = PROJECT
) -> PluginManager:
    """Make a manager with every installed plugin and the given one-file plugins.

    Raises:
        PluginError: A given file cannot be imported, or a plugin implements a hook that does not exist.
    """
    manager = PluginManager()
    for kind in KINDS:
        manager.add_hookspecs(_Specs(kind))  # type: ignore[arg-type]
    for point in sorted(entry_points(group=entry_point_group), key=lambda point: point.name):
        source = point.dist.name if point.dist else point.value
        version = point.dist.version if point.dist else ""
        try:
            _register(manager, point.load(), point.name, source, version)
        except Exception as error:  # noqa: BLE001 - whatever a plugin's import raises is its own failure
            failure = f"{type(error).__name__}: {error}"
            manager.failures.append(PluginInfo(point.name, source, version, error=failure))
            log.warning("plugin_failed", plugin=point.name, source=source, error=failure)
    for file in files:
        path = Path(file).resolve()
        _register(manager, load_file(path), path.stem, str(path), "")
    return manager


def load_file(path: Path) -> ModuleType:
    """Import a Python file as a module of its own.

    Raises:
        PluginError: The file does not exist or raises on import.
    """
    name = f"vflair_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise PluginError(f"There is no Python file {path}: give the path of a one-file plugin.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # attrs and inspect look a class's module up by name
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise PluginError(
            f"Plugin {path} failed on import: {type(error).__name__}: {error}"
        ) from error
    return module


def _register(manager: PluginManager, plugin: Any, name: str, source: str, version: str) -> None:
    for attribute in dir(plugin):
        if hasattr(getattr(plugin, attribute, None), f"{PROJECT}_impl") and attribute not in HOOKS:
            raise PluginError(
                f"Plugin {name} ({source}) implements {attribute!r}, which is not a hook."
                f"{did_you_mean(attribute, HOOKS)} Possible: {', '.join(HOOKS)}."
            )
    try:
        manager.register(plugin, name)
        manager.check_pending()
    except (pluggy.PluginValidationError, ValueError) as error:
        raise PluginError(f"Plugin {name} ({source}) does not fit: {error}") from error
    manager.sources[name] = (source, version)


class _Specs:
    """The hooks of one kind without their `self`, which pluggy would take for an argument."""

    def __init__(self, kind: type) -> None:
        for name, function in _hooks_of(kind).items():
            setattr(self, name, _without_self(function))


def _hooks_of(kind: type) -> dict[str, Callable[..., Any]]:
    return {name: f for name, f in vars(kind).items() if name.startswith(f"{PROJECT}_")}


def _without_self(function: Callable[..., Any]) -> Any:
    return function.__get__(object())


HOOKS: dict[str, str] = {
    name: inspect.getdoc(function) or ""
    for kind in KINDS
    for name, function in _hooks_of(kind).items()
}


# -- asking --------------------------------------------------------------------------------------------


@frozen
class Offered:
    """Something a plugin offers: its name, who offers it, and the thing or where it is imported from."""

    name: str
    source: str
    target: Callable[..., Any] | str

    def load(self) -> Callable[..., Any]:
        """Return the thing itself, importing it if need be."""
        if not isinstance(self.target, str):
            return self.target
        return load_target(self.target)

    @property
    def path(self) -> str:
        """Where a worker process finds it: ``module:attr``, or ``/a/file.py:attr`` for a one-file plugin."""
        return self.target if isinstance(self.target, str) else target_of(self.target)


def load_target(target: str) -> Callable[..., Any]:
    """Import ``"module:attr"`` or ``"/a/file.py:attr"``.

    Raises:
        PluginError: The module or the attribute does not exist.
    """
    module_name, _, attribute = target.rpartition(":")
    try:
        if module_name.endswith(".py"):
            module = load_file(Path(module_name))
        else:
            module = import_module(module_name)
        found: Any = module
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise PluginError(
            f"{target!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    return found  # type: ignore[no-any-return]


def target_of(thing: Any) -> str:
    """Return where `thing` (a class, a function or an instance) can be imported from."""
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    module = sys.modules.get(named.__module__)
    if named.__module__.startswith("vflair_plugin_") and module is not None and module.__file__:
        return f"{module.__file__}:{named.__qualname__}"
    return f"{named.__module__}:{named.__qualname__}"


def offers(manager: pluggy.PluginManager, shelf: Shelf) -> dict[str, Offered]:
    """Collect what all plugins offer of one sort.

    Raises:
        PluginError: Two plugins offer the same name.
    """
    found: dict[str, Offered] = {}
    for implementation in getattr(manager.hook, f"vflair_{shelf}").get_hookimpls():
        source = getattr(manager, "sources", {}).get(implementation.plugin_name, ("?", ""))[0]
        offer: Mapping[str, Any] = implementation.function()
        for name, target in offer.items():
            if name in found:
                raise PluginError(
                    f"Both {found[name].source} and {source} offer {shelf[:-1]} {name!r}: "
                    "uninstall one of them, or rename it."
                )
            found[name] = Offered(name, source, target)
    return dict(sorted(found.items()))


def find(manager: pluggy.PluginManager, shelf: Shelf, name: str) -> Offered:
    """Look one offered thing up by name.

    Raises:
        PluginError: Nobody offers it; the message says what is offered and which plugins failed.
    """
    found = offers(manager, shelf)
    if name in found:
        return found[name]
    broken = [f"{info.name} ({info.error})" for info in getattr(manager, "failures", ())]
    raise PluginError(
        f"No plugin offers {shelf[:-1]} {name!r}.{did_you_mean(name, found)} "
        f"Possible: {', '.join(found) or 'none; install a plugin that offers ' + shelf}."
        + (f" These plugins failed to load: {'; '.join(broken)}." if broken else "")
    )


def build(offered: Offered, options: Mapping[str, Any]) -> Any:
    """Call what was offered with `options`, with an error that names the options there are.

    Raises:
        PluginError: An option does not exist or one that is needed is missing.
    """
    thing = offered.load()
    known = [p for p in inspect.signature(thing).parameters.values() if p.kind is not p.VAR_KEYWORD]
    names = [parameter.name for parameter in known]
    for key in options:
        if key not in names:
            raise PluginError(
                f"{offered.name!r} has no option {key!r}.{did_you_mean(key, names)} "
                f"Possible: {', '.join(names) or 'none'}."
            )
    needed = [p.name for p in known if p.default is p.empty and p.name not in options]
    if needed:
        raise PluginError(f"{offered.name!r} needs the option {', '.join(needed)}.")
    return thing(**options)


def decide(manager: pluggy.PluginManager, hook: str, **arguments: Any) -> Any:
    """Ask a *decide* hook; None when nobody answers.

    Raises:
        PluginError: Two plugins answer.
    """
    answers = []
    for implementation in getattr(manager.hook, hook).get_hookimpls():
        given = {key: arguments[key] for key in implementation.argnames if key in arguments}
        answer = implementation.function(**given)
        if answer is not None:
            answers.append((implementation.plugin_name, answer))
    if len(answers) > 1:
        raise PluginError(
            f"{' and '.join(name for name, _ in answers)} both answer {hook}: remove one of them."
        )
    return answers[0][1] if answers else None


def observe(
    manager: pluggy.PluginManager | None, hook: str, /, *, strict: bool = False, **facts: Any
) -> None:
    """Tell all observers. One that raises is named in the log and stops nothing, unless `strict`.

    Raises:
        PluginError: An observer raised and `strict` is set.
    """
    if manager is None:
        return
    for implementation in getattr(manager.hook, hook).get_hookimpls():
        try:
            implementation.function(**{key: facts[key] for key in implementation.argnames})
        except Exception as error:
            log.warning(
                "observer_failed", plugin=implementation.plugin_name, hook=hook, error=repr(error)
            )
            if strict:
                raise PluginError(
                    f"Plugin {implementation.plugin_name} failed in {hook}: {error!r}."
                ) from error
