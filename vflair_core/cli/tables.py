"""What the program prints: lines and plain tables, on a terminal or into a file. Nothing here imports torch."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Collection, Sequence
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


def table(
    columns: tuple[str, ...], rows: Sequence[tuple[str, ...]], *, whole: Collection[str] = ()
) -> None:
    """Print a plain table; its first column and those named in `whole` are never cut or wrapped.

    A name that is cut off cannot be typed, and an interval in two lines not be read. Where the terminal is too narrow for
    them, its lines go on below.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.measure import Measurement
    from rich.table import Table

    shown = Table(*columns, box=None, header_style="bold", pad_edge=False, padding=(0, 1))
    for number, name in enumerate(columns):
        if number == 0 or name in whole:
            widths = [len(row[number]) for row in rows]
            shown.columns[number].no_wrap = True
            shown.columns[number].min_width = max([len(name), *widths])
    for row in rows:
        shown.add_row(*(escape(cell) for cell in row))
    piped = not sys.stdout.isatty()
    console = Console(soft_wrap=piped, width=PIPED if piped else None)
    wide = console.options.update(width=10 * PIPED)
    console.width = max(console.width, Measurement.get(console, wide, shown).minimum)
    console.print(shown, crop=False)


def say(text: str) -> None:
    """Print a line."""
    sys.stdout.write(text + "\n")
