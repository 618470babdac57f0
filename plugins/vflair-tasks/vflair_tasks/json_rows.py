"""Rows of jsonl and json files, numbers as they are written; what is no row is an error that names it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vflair_core import TaskError
from vflair_tasks.delimited import lines_of

Object = dict[str, Any]
_SPACE = " \t\r\n"


class _TwiceError(ValueError):
    """An object has a key twice."""


def _object(pairs: list[tuple[str, Any]]) -> Object:
    made = dict(pairs)
    if len(made) != len(pairs):
        keys = [key for key, _ in pairs]
        raise _TwiceError(
            f"the key {next(key for key in keys if keys.count(key) > 1)!r} is there twice"
        )
    return made


# 1.50 and twenty digits stay what they are: a number is the text that it is written as.
DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=str, parse_float=str, parse_constant=str
)


def rows_of(file: Path, encoding: str) -> Iterator[Object]:
    """Yield the objects of a file: one in each line, or those of one list.

    Raises:
        TaskError: It is written otherwise; the message names the row, or the line.
    """
    lines = lines_of(file, encoding)
    first = next((line for line in lines if line.strip()), "")
    lines.close()  # type: ignore[attr-defined]
    if not first:
        raise TaskError(f"{file} is empty. Give a file with at least one row.")
    if first.lstrip().startswith("["):
        return _of_list(file, encoding)
    if file.suffix.lower() == ".json" and not _is_object(first):
        return _of_one(file, encoding)
    return _of_lines(file, encoding)


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _of_lines(file: Path, encoding: str) -> Iterator[Object]:
    number = 0
    for place, line in enumerate(lines_of(file, encoding)):
        if not line.strip():
            continue
        try:
            row = DECODER.decode(line)
        except ValueError as error:
            raise _does_not_parse(
                file, f"row {number} (the first is 0), line {place + 1}: {error}"
            ) from error
        yield _checked(file, number, row)
        number += 1


def _of_list(file: Path, encoding: str) -> Iterator[Object]:
    """Yield one object after the other: all of them at once take several times the memory of the text."""
    text = "\n".join(lines_of(file, encoding))
    place, number = _after(text, text.index("[") + 1), 0
    while not text.startswith("]", place):
        try:
            row, place = DECODER.raw_decode(text, place)
        except ValueError as error:
            raise _does_not_parse(file, f"row {number} (the first is 0): {error}") from error
        yield _checked(file, number, row)
        number += 1
        place = _after(text, place)
        if text.startswith(",", place):
            place = _after(text, place + 1)
        elif not text.startswith("]", place):
            raise _does_not_parse(
                file, f"after row {number - 1} (the first is 0) stands neither , nor ]"
            )
    if _after(text, place + 1) != len(text):
        raise _does_not_parse(file, "something stands behind the list")


def _after(text: str, place: int) -> int:
    """Return the next place that is no space."""
    while place < len(text) and text[place] in _SPACE:
        place += 1
    return place


def _of_one(file: Path, encoding: str) -> Iterator[Object]:
    """Take the one list of objects that an object over several lines holds, such as ``{"data": [...]}``."""
    try:
        whole = DECODER.decode("\n".join(lines_of(file, encoding)))
    except ValueError as error:
        raise _does_not_parse(file, str(error)) from error
    lists = [
        key
        for key, value in (whole.items() if isinstance(whole, dict) else ())
        if isinstance(value, list) and value and all(isinstance(row, dict) for row in value)
    ]
    if len(lists) != 1:
        keys = ", ".join(whole) if isinstance(whole, dict) else repr(whole)[:40]
        raise _does_not_parse(
            file,
            f"there is one object ({keys}) and {len(lists)} lists of rows in it; rows are objects in a list, or one in "
            "each line",
        )
    yield from whole[lists[0]]


def _checked(file: Path, number: int, row: Any) -> Object:
    if not isinstance(row, dict):
        raise _does_not_parse(
            file,
            f"row {number} (the first is 0) is {json.dumps(row)[:40]} and no object of columns",
        )
    return row


def _does_not_parse(file: Path, reason: str) -> TaskError:
    return TaskError(
        f"{file} does not parse as {file.suffix[1:]}: {reason}. Repair the file; nothing of it was kept."
    )
