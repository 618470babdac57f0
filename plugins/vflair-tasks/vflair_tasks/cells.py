"""What a cell of the user's own data says in its use: text as it is written, answers, choices, spans; or why it cannot.

Of csv every cell is text. Of json and parquet a cell may hold lists and objects; a path goes into them, as in
``messages[-1].content``.
"""

from __future__ import annotations

import datetime as dt
import decimal
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attrs import frozen

_STEP = re.compile(r"\.([^.\[\]]+)|\[(-?\d+)\]")
_PATH = re.compile(r"([^.\[\]]+)((?:\.[^.\[\]]+|\[-?\d+\])+)")


class CellError(Exception):
    """Why a cell cannot be used; who reads it adds file, row and column."""


@frozen
class Use:
    """What a column is used for.

    Args:
        option: As the user wrote it: a column, or a path into one.
        column: The column itself.
        steps: Where in its cells: keys and places.
        role: ``text``, ``label``, ``answer``, ``placed`` (an answer in a passage), ``choices``, ``image`` or ``spans``.
        join: What is put between the items of a list that is text; None refuses lists.
    """

    option: str
    column: str
    steps: tuple[str | int, ...] = ()
    role: str = "text"
    join: str | None = None

    def __call__(self, cell: Any, *, flat: bool = False) -> Any:
        """Return what the cell says; None if it says nothing.

        Args:
            cell: As the file has it.
            flat: Of a file whose cells are all text: a list is written as json there.

        Raises:
            CellError: It does not say what it is used for.
        """
        if flat and (self.steps or self.role in ("choices", "spans", "placed")):
            cell = _parsed(cell, needed=bool(self.steps) or self.role != "placed")
        for step in self.steps:
            cell = _into(cell, step)
        nothing = cell is None or (isinstance(cell, float) and math.isnan(cell))
        return None if nothing else _READ[self.role](cell, self)


def use_of(option: str, columns: Sequence[str], **more: Any) -> Use:
    """Return the use of an option: a column of that very name, else a path into one."""
    match = None if option in columns else _PATH.fullmatch(option)
    if match is None:
        return Use(option, option, **more)
    steps = tuple(key or int(place) for key, place in _STEP.findall(match[2]))
    return Use(option, match[1], steps, **more)


def _parsed(cell: Any, *, needed: bool) -> Any:
    """Read json that stands in a cell of text."""
    if not isinstance(cell, str) or (not needed and cell[:1] not in "[{"):
        return cell
    if not cell.strip():
        return None
    try:
        return json.loads(cell, parse_int=str, parse_float=str, parse_constant=str)
    except ValueError as error:
        if not needed:
            return cell
        raise CellError(
            f"{_shown(cell)} is not json, as lists and objects are written in such a cell ({error})"
        ) from error


def _into(cell: Any, step: str | int) -> Any:
    if cell is None:
        return None
    try:
        if isinstance(step, int) and _is_list(cell):
            return cell[step]
        if isinstance(step, str) and isinstance(cell, Mapping):
            return cell[step]
    except IndexError as error:
        raise CellError(f"there is no [{step}] in a list of {len(cell)}") from error
    except KeyError as error:
        raise CellError(f"there is no {step!r} in an object of {', '.join(cell)}") from error
    wanted = "list" if isinstance(step, int) else "object"
    raise CellError(f"{_shown(cell)} is no {wanted} to look for {step!r} in")


# -- the uses --------------------------------------------------------------------------------------------------


def as_text(cell: Any, use: Use) -> str:
    """Return the text of a cell: numbers and truth values as json writes them, dates as ISO 8601 does."""
    if isinstance(cell, str):
        return cell
    if _is_list(cell) and use.join is not None:
        return use.join.join(as_text(part, use) for part in cell)
    return _scalar(cell, use)


def as_texts(cell: Any, use: Use) -> list[str]:
    """Return one text, or a list of them, as a list."""
    return [_scalar(part, use) for part in (cell if _is_list(cell) else [cell]) if part is not None]


def as_choices(cell: Any, use: Use) -> list[str]:
    """Return a list of texts."""
    if isinstance(cell, Mapping) and "text" in cell:  # {"text": [...], "label": ["A", ...]}
        cell = cell["text"]
    if not _is_list(cell):
        raise CellError(f"{_shown(cell)} is no list of choices")
    return as_texts(cell, use)


def as_placed(cell: Any, use: Use) -> dict[str, list[Any]]:
    """Return texts and where they start in their passage, which may be left out; the forms are SQuAD's."""
    if isinstance(cell, Mapping):
        if "text" not in cell:
            raise CellError(f"an answer of {', '.join(cell)} has no 'text'")
        texts, starts = as_texts(cell["text"], use), cell.get("answer_start")
        starts = [] if starts is None else starts if _is_list(starts) else [starts]
    else:
        parts = cell if _is_list(cell) else [cell]
        objects = [part for part in parts if isinstance(part, Mapping)]
        if objects and len(objects) == len(parts):
            found = [as_placed(part, use) for part in objects]
            texts = [text for part in found for text in part["text"]]
            starts = [start for part in found for start in part["answer_start"]]
        else:
            texts, starts = as_texts(parts, use), []
    if starts and len(starts) != len(texts):
        raise CellError(f"there are {len(texts)} texts and {len(starts)} places where they start")
    return {"text": texts, "answer_start": [_whole(start) for start in starts]}


def as_spans(cell: Any, _: Use) -> list[list[int]]:
    """Return pairs of characters: first, and the one behind the last."""
    if not _is_list(cell):
        raise CellError(f"{_shown(cell)} is no list of [start, end]")
    if len(cell) == 2 and not any(_is_list(part) or isinstance(part, Mapping) for part in cell):
        cell = [cell]  # one span
    spans = []
    for part in cell:
        pair = [part.get("start"), part.get("end")] if isinstance(part, Mapping) else part
        if not _is_list(pair) or len(pair) != 2:
            raise CellError(f"{_shown(part)} is no [start, end]")
        spans.append([_whole(place) for place in pair])
    return spans


# -- one value -------------------------------------------------------------------------------------------------


def _scalar(cell: Any, use: Use) -> str:
    if isinstance(cell, str):
        return cell
    if isinstance(cell, bool):
        return "true" if cell else "false"
    if isinstance(cell, (int, float, decimal.Decimal)):
        return str(cell)
    if isinstance(cell, (dt.date, dt.time)):
        return cell.isoformat(" ") if isinstance(cell, dt.datetime) else cell.isoformat()
    raise CellError(f"{_shown(cell)} is {_kind(cell)} and no text. {_advice(cell, use)}")


def _advice(cell: Any, use: Use) -> str:
    here = use.option
    if isinstance(cell, Mapping):
        return f"Name the part that is meant, e.g. {here}.{next(iter(cell), 'key')}"
    if not _is_list(cell):
        return "Convert the column to text"
    part = cell[-1] if cell else None
    if isinstance(part, Mapping):
        key = "content" if "content" in part else next(iter(part), "key")
        return f"Name the part that is meant, e.g. {here}[-1].{key}"
    return f"Name the item that is meant, e.g. {here}[0]" + (
        ', or put all together with join = " "' if use.role == "text" else ""
    )


def _kind(cell: Any) -> str:
    if isinstance(cell, Mapping):
        return "an object"
    return f"a list of {len(cell)}" if _is_list(cell) else f"a {type(cell).__name__}"


def _is_list(cell: Any) -> bool:
    return isinstance(cell, (list, tuple))


def _shown(cell: Any) -> str:
    text = repr(cell)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _whole(value: Any) -> int:
    try:
        if isinstance(value, (int, str)) and not isinstance(value, bool):
            return int(value)
    except ValueError:
        pass
    raise CellError(f"{_shown(value)} is no place in a text")


_READ: Mapping[str, Callable[[Any, Use], Any]] = {
    "text": as_text,
    "label": _scalar,
    "image": _scalar,
    "answer": as_texts,
    "placed": as_placed,
    "choices": as_choices,
    "spans": as_spans,
}
