"""What plugins offer, described: the options of a thing, the knowledge of an attack, its source."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

import attrs

from vflair_core.errors import PluginError, VflairError, alternatives
from vflair_core.offers import Offered, Shelf, absences, build, offers
from vflair_core.plugins import PluginManager
from vflair_core.tasks.spans import rendered
from vflair_core.tasks.task import Span, Task, TaskCard

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
        said = f"No plugin offers {name!r}.{alternatives(name, everything)}"
        raise PluginError(said + absences(manager))
    shelf, offered = everything[name]
    thing = offered.load()
    facts: dict[str, Any] = {
        "name": name,
        "sort": shelf[:-1],
        "from": offered.source,
        "text": _ARGUMENTS.sub("", inspect.getdoc(thing) or ""),
        "options": _options(thing) if isinstance(thing, type) or shelf == "tasks" else [],
    }
    if shelf == "tasks":
        facts |= {"card": card_of(thing), "example": example_of(offered, options or {})}
    elif options:
        raise PluginError(f"{name!r} is no task: nothing is made of {', '.join(options)} here.")
    if shelf == "attacks":
        facts["knowledge"] = _knowledge(thing)
    return facts


_ARGUMENTS = re.compile(r"\n\n(?:Args|Attributes):\n((?:    .*\n?|\n(?=    ))+)")
_EXPLAINED = re.compile(r"^    (\w+): (.*(?:\n     .*)*)", re.MULTILINE)


def _options(thing: Any) -> list[dict[str, str]]:
    section = _ARGUMENTS.search(inspect.getdoc(thing) or "")
    about = dict(_EXPLAINED.findall(section[1])) if section else {}
    return [
        {
            "name": parameter.name,
            "type": inspect.formatannotation(parameter.annotation).strip("'"),
            "default": "needed"
            if parameter.default is parameter.empty
            else repr(parameter.default),
        }
        | ({"about": " ".join(about[parameter.name].split())} if parameter.name in about else {})
        for parameter in inspect.signature(thing).parameters.values()
    ]


def _knowledge(thing: Any) -> dict[str, list[str]]:
    call = thing.__call__ if isinstance(thing, type) else thing
    parameters = [p for p in inspect.signature(call).parameters.values() if p.name != "self"]
    return {
        "needs": [p.name for p in parameters if p.default is p.empty],
        "can use": [p.name for p in parameters if p.default is not p.empty],
    }


OPEN, CLOSE = "«", "»"


def card_of(thing: Any) -> dict[str, Any]:
    """Return what a task function's card says, or nothing if it has none; no data is loaded."""
    card = getattr(thing, "card", None)
    return attrs.asdict(card) if isinstance(card, TaskCard) else {}


def size_of(card: Mapping[str, Any]) -> str:
    """Return the rows of each split in a few characters: ``"train 800, test 200"``."""
    return ", ".join(f"{split} {rows}" for split, rows in card.get("sizes", {}).items())


def example_of(offered: Offered, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the first test example as it stands and as the model reads it, private spans marked.

    The task is made for this. Where it cannot be, ``"missing"`` says why: data that are not there, an option that
    is needed, a prompt that only a model's own tokenizer can write.
    """
    try:
        task: Task = build(offered, options)
        example = task.row("test", 0)
        shown = example if task.render is None else rendered(example, task.render(example, None))
    except VflairError as error:
        return {"missing": str(error)}
    facts = {
        "text": marked(shown.text, shown.private),
        "pair": None if shown.pair is None else marked(shown.pair, shown.private_pair),
        "label": task.labels[int(example.label)]
        if task.labels and example.label is not None
        else example.label,
        "answer": list(example.accepted) or None,
        "choices": list(example.choices) or None,
        "pictures": len(example.images) or None,
    }
    sizes = {"train": len(task.train), "test": len(task.test), "public": len(task.public)}
    named = {name: value for name, value in facts.items() if value is not None}
    return {"kind": task.kind, "sizes": sizes, "rendered": task.render is not None, **named}


def marked(text: str, spans: tuple[Span, ...] | None) -> str:
    """Return `text` with `OPEN` and `CLOSE` around what is private; None means all of it."""
    for start, end in sorted(((0, len(text)),) if spans is None else spans, reverse=True):
        text = text[:start] + OPEN + text[start:end] + CLOSE + text[end:]
    return text
