"""What plugins offer, described: the options of a thing, the knowledge of an attack, its source."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from vflair_core.errors import PluginError, did_you_mean
from vflair_core.plugins import PluginManager, Shelf, offers
from vflair_core.showing import card_of, example_of

SHELVES: tuple[Shelf, ...] = ("attacks", "defenses", "tasks")


def describe(
    manager: PluginManager, name: str, options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return name, sort, source, text and options of an attack, a defense or a task.

    Of an attack also what it needs to know; of a task its card and one example, made with `options`.

    Raises:
        PluginError: Nobody offers the name, or `options` are given for something that is no task.
    """
    everything = {key: (shelf, o) for shelf in SHELVES for key, o in offers(manager, shelf).items()}
    if name not in everything:
        raise PluginError(
            f"No plugin offers {name!r}.{did_you_mean(name, everything)} Possible: {', '.join(everything)}."
        )
    shelf, offered = everything[name]
    thing = offered.load()
    facts: dict[str, Any] = {
        "name": name,
        "sort": shelf[:-1],
        "from": offered.source,
        "text": inspect.getdoc(thing) or "",
        "options": _options(thing) if isinstance(thing, type) or shelf == "tasks" else [],
    }
    if shelf == "tasks":
        facts |= {"card": card_of(thing), "example": example_of(offered, options or {})}
    elif options:
        raise PluginError(f"{name!r} is no task: nothing is made of {', '.join(options)} here.")
    if shelf == "attacks":
        facts["knowledge"] = _knowledge(thing)
    return facts


def _options(thing: Any) -> list[dict[str, str]]:
    return [
        {
            "name": parameter.name,
            "type": inspect.formatannotation(parameter.annotation).strip("'"),
            "default": "needed"
            if parameter.default is parameter.empty
            else repr(parameter.default),
        }
        for parameter in inspect.signature(thing).parameters.values()
    ]


def _knowledge(thing: Any) -> dict[str, list[str]]:
    call = thing.__call__ if isinstance(thing, type) else thing
    parameters = [p for p in inspect.signature(call).parameters.values() if p.name != "self"]
    return {
        "needs": [p.name for p in parameters if p.default is p.empty],
        "can use": [p.name for p in parameters if p.default is not p.empty],
    }
