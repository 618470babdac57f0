"""Tasks described: what their card says, and one example in its prompt with its private spans marked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from vflair_core.errors import VflairError
from vflair_core.plugins import Offered, build
from vflair_core.tasks.spans import rendered
from vflair_core.tasks.task import Span, Task, TaskCard

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
