"""What the program prints: lines and plain tables, on a terminal or into a file. Nothing here imports torch."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
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
