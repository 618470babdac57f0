"""What the program prints: lines and plain tables, on a terminal or into a file. Nothing here imports torch."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

PIPED = 240  # columns of a table that goes into a file or another program


def plain(value: Any) -> str:
    """A value of a card as one line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def summary(thing: Any) -> str:
    """The first line of a docstring."""
    return (inspect.getdoc(thing) or "").split("\n", 1)[0]


def table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Print a plain table; its first column is never cut."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    shown = Table(*columns, box=None, header_style="bold", pad_edge=False)
    shown.columns[0].no_wrap = True  # a name that is cut off cannot be typed
    for row in rows:
        shown.add_row(*(escape(cell) for cell in row))
    piped = not sys.stdout.isatty()
    Console(soft_wrap=piped, width=PIPED if piped else None).print(shown)


def say(text: str) -> None:
    """Print a line."""
    sys.stdout.write(text + "\n")


def list_tasks(found: Mapping[str, Any], *, json_: bool) -> None:
    """A task's card says what there is to know without its data; what has none is listed without."""
    from vflair_core.showing import card_of, size_of

    loaded = {name: (offered, offered.load()) for name, offered in found.items()}
    if json_:
        facts = [
            {"name": name, "from": offered.source, "summary": summary(thing), **card_of(thing)}
            for name, (offered, thing) in loaded.items()
        ]
        say(json.dumps(facts, indent=2))
        return
    rows = []
    for name, (_, thing) in loaded.items():
        card = card_of(thing)
        told = (card.get("kind", ""), size_of(card), card.get("metric", ""), card.get("source", ""))
        rows.append((name, *told, card.get("licence", ""), summary(thing)))
    columns = ("name", "kind", "size", "metric", "source", "licence", "what it does")
    table(columns, rows)
