"""What plugins offer by name, and where each thing is imported from."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_type_hints

import attrs
import pluggy
from attrs import frozen

from vflair_core.errors import PluginError, alternatives
from vflair_core.plugins import CHOICE, ONE_FILE, load_file

Shelf = Literal["attacks", "defenses", "tasks", "commands"]


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
        thing: Any = module
        for part in attribute.split("."):
            thing = getattr(thing, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise PluginError(
            f"{target!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    return thing  # type: ignore[no-any-return]


def target_of(thing: Any) -> str:
    """Return where `thing` (a class, a function or an instance) can be imported from."""
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    module = sys.modules.get(named.__module__)
    if file := getattr(module, ONE_FILE, None):
        return f"{file}:{named.__qualname__}"
    return f"{named.__module__}:{named.__qualname__}"


def offers(manager: pluggy.PluginManager, shelf: Shelf) -> dict[str, Offered]:
    """Collect what all plugins offer of one sort.

    Raises:
        PluginError: Two plugins offer the same name.
    """
    offered: dict[str, Offered] = {}
    for implementation in getattr(manager.hook, f"vflair_{shelf}").get_hookimpls():
        source = getattr(manager, "sources", {}).get(implementation.plugin_name, ("?", ""))[0]
        offer: Mapping[str, Any] = implementation.function()
        for name, target in offer.items():
            if name in offered:
                raise PluginError(
                    f"Both {offered[name].source} and {source} offer {shelf[:-1]} {name!r}: "
                    "uninstall one of them, or rename it."
                )
            offered[name] = Offered(name, source, target)
    return dict(sorted(offered.items()))


def find(manager: pluggy.PluginManager, shelf: Shelf, name: str) -> Offered:
    """Look one offered thing up by name.

    Raises:
        PluginError: Nobody offers it; the message says what is offered and which plugins failed.
    """
    offered = offers(manager, shelf)
    if name in offered:
        return offered[name]
    raise PluginError(
        f"No plugin offers {shelf[:-1]} {name!r}."
        + alternatives(name, offered, none=f"none; install a plugin that offers {shelf}")
        + absences(manager)
    )


def absences(manager: pluggy.PluginManager) -> str:
    """What an error about a missing name should say beside: which plugins failed, and which were left out."""
    broken = [f"{info.name} ({info.error})" for info in getattr(manager, "failures", ())]
    left_out = [info.name for info in getattr(manager, "left_out", ())]
    failed = f" These plugins failed to load: {'; '.join(broken)}." if broken else ""
    chosen = f" Left out by {CHOICE} or --no-plugin: {', '.join(left_out)}." if left_out else ""
    return failed + chosen


def build(offered: Offered, options: Mapping[str, Any]) -> Any:
    """Call what was offered with `options`, with an error that names the options there are.

    Raises:
        PluginError: An option does not exist, one that is needed is missing, or one is of another type or range.
    """
    thing = offered.load()
    known = [p for p in inspect.signature(thing).parameters.values() if p.kind is not p.VAR_KEYWORD]
    names = [parameter.name for parameter in known]
    for key in options:
        if key not in names:
            raise PluginError(f"{offered.name!r} has no option {key!r}.{alternatives(key, names)}")
    needed = [p.name for p in known if p.default is p.empty and p.name not in options]
    if needed:
        raise PluginError(f"{offered.name!r} needs the option {', '.join(needed)}.")
    _check_types(offered.name, thing, options)
    try:
        return thing(**options)
    except (TypeError, ValueError) as error:
        given = ", ".join(f"{key}={value!r}" for key, value in options.items())
        raise PluginError(
            f"{offered.name!r} does not take {given or 'no options'}: {error}. `vflair show {offered.name}` says what each "
            "option is."
        ) from error


# What an option that is said to be one of these may be, and how that is called.
PLAIN: dict[Any, tuple[tuple[type, ...], str]] = {
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "a text"),
    bool: ((bool,), "true or false"),
}


def _check_types(name: str, thing: Any, options: Mapping[str, Any]) -> None:
    """See that options which are said to be a number, a text or a truth value are one, before anything is built of them.

    Raises:
        PluginError: One is something else.
    """
    try:
        hints = get_type_hints(vars(thing)["__init__"] if isinstance(thing, type) else thing)
    except (NameError, TypeError, KeyError):  # of names that only a type checker knows
        return
    for key, value in options.items():
        kinds, called = PLAIN.get(hints.get(key), ((), ""))
        # true is no number, though Python counts with it
        if kinds and (not isinstance(value, kinds) or (type(value) is bool and bool not in kinds)):
            raise PluginError(f"{name!r} takes {called} as {key}, not {value!r}.")


def options_of(thing: Any) -> dict[str, Any] | None:
    """Return the options that an attrs object was built with, by name; None of an object without such fields."""
    if not attrs.has(type(thing)):
        return None
    names = [f.name for f in attrs.fields(type(thing)) if f.init]
    return {name.lstrip("_"): getattr(thing, name) for name in names}
