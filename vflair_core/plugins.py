"""The plugin manager: a value that is made and passed on, never shared globally.

Entry points are loaded one by one. A plugin that cannot be imported is remembered with its reason, shown
by ``vflair plugins``, and breaks nothing else.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy
from attrs import frozen

from vflair_core.errors import PluginError, alternatives
from vflair_core.events import events
from vflair_core.hookspecs import API_VERSION, KINDS, OLDEST_API, PROJECT

CHOICE = "VFLAIR_PLUGINS"
ONE_FILE = (
    "__vflair_plugin_file__"  # of a module that was loaded from a file, and can only be found there
)


@frozen
class PluginInfo:
    """One plugin as ``vflair plugins`` shows it; `error` is set when it could not be loaded, or was left out."""

    name: str
    source: str
    version: str = ""
    hooks: tuple[str, ...] = ()
    error: str | None = None


class PluginManager(pluggy.PluginManager):
    """A pluggy manager that also remembers where each plugin came from, which ones failed, and which were left out."""

    def __init__(self) -> None:
        super().__init__(PROJECT)
        self.sources: dict[str, tuple[str, str]] = {}
        self.failures: list[PluginInfo] = []
        self.left_out: list[PluginInfo] = []

    def register(self, plugin: Any, name: str | None = None) -> str | None:
        """Register a plugin, as pluggy does.

        Raises:
            PluginError: It implements a hook that does not exist, or was written for another API.
        """
        called = name or self.get_canonical_name(plugin)
        source = self.sources.get(called, ("registered by hand", ""))[0]
        _see_that_it_fits(plugin, f"{called} ({source})", self)
        return super().register(plugin, name)

    def about(self) -> list[PluginInfo]:
        """Describe every plugin: loaded, failed, or left out."""
        loaded = [
            PluginInfo(
                name,
                *self.sources.get(name, ("registered by hand", "")),
                hooks=tuple(sorted(caller.name for caller in self.get_hookcallers(plugin) or ())),
            )
            for name, plugin in self.list_name_plugin()
            if plugin is not None
        ]
        return loaded + self.failures + self.left_out


def plugin_manager(
    files: Iterable[str | Path] = (), *, entry_point_group: str = PROJECT
) -> PluginManager:
    """Make a manager with every installed plugin and the given one-file plugins.

    A file is a plugin by its functions, or by an object with the hooks that it calls `plugin`. Of the installed ones the
    environment variable VFLAIR_PLUGINS chooses: ``a,b`` takes these and no other, ``-a`` takes all but this one, and
    nothing at all takes none. Files that are given are always taken.

    Raises:
        PluginError: A given file cannot be imported, a plugin implements a hook that does not exist, or VFLAIR_PLUGINS
            names none that is installed.
    """
    manager = PluginManager()
    for kind in KINDS:
        manager.add_hookspecs(_Specs(kind))  # type: ignore[arg-type]
    points = sorted(entry_points(group=entry_point_group), key=lambda point: point.name)
    chosen = _chosen([point.name for point in points], os.environ.get(CHOICE))
    for point in points:
        source = point.dist.name if point.dist else point.value
        version = point.dist.version if point.dist else ""
        if point.name not in chosen:
            why = f"left out by {CHOICE} or --no-plugin"
            manager.left_out.append(PluginInfo(point.name, source, version, error=why))
            continue
        try:
            _register(manager, point.load(), point.name, source, version)
        except Exception as error:  # noqa: BLE001 - whatever a plugin's import raises is its own failure
            failure = f"{type(error).__name__}: {error}"
            manager.failures.append(PluginInfo(point.name, source, version, error=failure))
            _warn("plugin_failed", plugin=point.name, source=source, error=failure)
    for file in files:
        path = Path(file).resolve()
        module = load_file(path)
        _register(manager, getattr(module, "plugin", module), path.stem, str(path), "")
    return manager


def _chosen(installed: list[str], choice: str | None) -> set[str]:
    """The names of installed plugins that a value of VFLAIR_PLUGINS takes."""
    if choice is None:
        return set(installed)
    words = [word.strip() for word in choice.split(",") if word.strip()]
    for word in words:
        if word.removeprefix("-") not in installed:
            raise PluginError(
                f"{CHOICE} (or --no-plugin) names {word.removeprefix('-')!r}, which is not installed."
                + alternatives(word.removeprefix("-"), installed, none="none")
            )
    without = {word.removeprefix("-") for word in words if word.startswith("-")}
    only = {word for word in words if not word.startswith("-")}
    return (only or set(installed if without else ())) - without


def _warn(event: str, **facts: Any) -> None:
    events(__name__).warning(event, **facts)


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
    module.__dict__[ONE_FILE] = str(path)
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
    manager.sources[name] = (source, version)
    try:
        manager.register(plugin, name)
        manager.check_pending()
    except (pluggy.PluginValidationError, ValueError) as error:
        raise PluginError(f"Plugin {name} ({source}) does not fit: {error}") from error


def _see_that_it_fits(plugin: Any, called: str, manager: pluggy.PluginManager) -> None:
    """A plugin implements hooks that there are, and was written for an API that this core has."""
    asked = getattr(plugin, "VFLAIR_API", API_VERSION)
    if type(asked) is not int or not OLDEST_API <= asked <= API_VERSION:
        newer = type(asked) is int and asked > API_VERSION
        remedy = "update vflair-core" if newer else "update the plugin, or its VFLAIR_API"
        raise PluginError(
            f"Plugin {called} was written for VFLAIR_API = {asked!r}, and this vflair-core takes "
            f"{OLDEST_API} to {API_VERSION}: {remedy}."
        )
    for attribute in dir(plugin):
        caller = getattr(manager.hook, attribute, None)
        there = isinstance(caller, pluggy.HookCaller) and caller.has_spec()
        if hasattr(getattr(plugin, attribute, None), f"{PROJECT}_impl") and not there:
            raise PluginError(
                f"Plugin {called} implements {attribute!r}, which is not a hook."
                f"{alternatives(attribute, HOOKS)}"
            )


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
            _warn(
                "observer_failed", plugin=implementation.plugin_name, hook=hook, error=repr(error)
            )
            if strict:
                raise PluginError(
                    f"Plugin {implementation.plugin_name} failed in {hook}: {error!r}."
                ) from error
