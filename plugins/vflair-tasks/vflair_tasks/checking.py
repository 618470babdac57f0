"""Checks that go through whole columns before anything else happens, in memory that does not grow with the table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vflair_core import TaskError, alternatives

if TYPE_CHECKING:
    from datasets import Dataset

MOST_CLASSES = 1000


def column_of(table: Dataset, names: Sequence[str], *, where: str) -> str:
    """Return the first of `names` that the table has as a column.

    Raises:
        TaskError: It has none of them, or no row.
    """
    for name in names:
        if name in table.column_names:
            return name
    there = alternatives(names[0], table.column_names, label="It has")
    raise TaskError(f"{where} has no column {' or '.join(map(repr, names))}.{there}")


def empty_cells(table: Dataset, columns: Sequence[str]) -> list[tuple[int, str]]:
    """Return (row, column) of every cell that is null, not a number or an empty text, in the order of rows."""
    import pyarrow as pa
    import pyarrow.compute as pc

    found: list[tuple[int, str]] = []
    for column in columns:
        first = 0
        for cells in table.data.column(
            column
        ).chunks:  # one by one: a copy of the column may not fit
            bad = pc.is_null(cells, nan_is_null=pa.types.is_floating(cells.type))
            if pa.types.is_string(cells.type) or pa.types.is_large_string(cells.type):
                empty = pc.equal(pc.utf8_trim_whitespace(cells), "")
                bad = pc.or_(bad, pc.fill_null(empty, fill_value=True))
            if pc.any(bad).as_py():
                found += [(first + n, column) for n in pc.indices_nonzero(bad).to_pylist()]
            first += len(cells)
    return sorted(found)


def first_fault(
    table: Dataset,
    numbers: Sequence[int],
    columns: Sequence[str],
    *,
    where: str,
    fault: Callable[..., str],
) -> None:
    """Go through the rows that take part, in constant memory, and stop at the first fault.

    Args:
        table: All rows.
        numbers: Those that take part.
        columns: What `fault` is given, one argument each.
        where: How error messages call the table.
        fault: Says what is wrong with a row, or ``""``.

    Raises:
        TaskError: Something is wrong; the message names row and column.
    """
    wanted = numbers if isinstance(numbers, range) else set(numbers)
    number = 0
    for batch in table.select_columns(list(columns)).iter(batch_size=1000):
        for cells in zip(*(batch[column] for column in columns), strict=True):
            trouble = fault(*cells) if number in wanted else ""
            if trouble:
                raise TaskError(
                    f"{where}, row {number} (the first is 0), column {columns[0]!r}: {trouble}. Correct the cell "
                    "or drop the row."
                )
            number += 1


def class_names(table: Dataset, column: str, *, where: str) -> tuple[str, ...]:
    """Return the names of the classes in a column: its own if it has any, else its distinct values, sorted.

    Raises:
        TaskError: It has one value or too many to be classes.
    """
    import pyarrow.compute as pc

    feature = table.features[column]
    names = getattr(feature, "names", None)
    if names:
        return tuple(names)
    values = [v for v in pc.unique(table.data.column(column)).to_pylist() if v is not None]
    values = [value for value in values if str(value).strip()]
    numbers = [_number(value) for value in values]
    if None not in numbers and not all(map(float.is_integer, numbers)):  # type: ignore[arg-type]
        raise TaskError(
            f"{where}, column {column!r} holds fractions such as {_told(values[0])}, which are no classes. "
            'Set kind = "regression".'
        )
    if not 1 < len(values) <= MOST_CLASSES:
        raise TaskError(
            f"{where}, column {column!r} has {len(values)} distinct values; classes are 2 to {MOST_CLASSES}. "
            'Choose another label column, or another kind, e.g. "regression".'
        )
    if None not in numbers:  # also text: 2 is before 10
        values = [value for _, value in sorted(zip(numbers, values, strict=True), key=_order)]
    return tuple(dict.fromkeys(map(_name, values if None not in numbers else sorted(values))))


def _order(numbered: tuple[float | None, Any]) -> tuple[float, str]:
    number, value = numbered
    return number or 0.0, str(value)


def _number(value: Any) -> float | None:
    """Return a label as a number, if it is one."""
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def label_numbers(
    table: Dataset, column: str, labels: Sequence[str], *, where: str
) -> dict[Any, int]:
    """Return the index of the class of each value in the column: a value is a name, or else an index.

    Raises:
        TaskError: A value is of no class; the message names the first row that has it.
    """
    import pyarrow.compute as pc

    cells = table.data.column(column)
    has_names = bool(getattr(table.features[column], "names", None))
    index = {name: number for number, name in enumerate(labels)}
    by_number = has_names or not any(
        map(str.isdigit, labels)
    )  # among classes "3" and "4" a 1 is none
    found: dict[Any, int] = {}
    for value in pc.unique(cells).to_pylist():
        if value is None or not str(value).strip():
            continue  # empty cells are another check's business
        name = _name(value)
        if not has_names and name in index:
            found[value] = index[name]
        elif by_number and name.isdigit() and int(name) < len(labels):  # also in a column of text
            found[value] = int(name)
        else:
            row = pc.index(cells, value).as_py()
            raise TaskError(
                f"{where}, row {row} (the first is 0), column {column!r}: {_told(value)} is none of the "
                f"{len(labels)} labels {', '.join(labels[:20])}. Correct it, or name all classes: labels = [...]."
            )
    return found


def _told(value: Any) -> str:
    """Show a value in an error: a number as it is, also where it is text."""
    return str(value) if _number(str(value)) is not None else repr(value)


def _name(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) else str(value)


def number_fault(value: Any) -> str:
    """Say why a cell is no number."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return f"{value!r} is not a number"
    if isinstance(value, str) and not (value.isascii() and "_" not in value):
        return f"{value!r} is not a number as files write one"  # Python reads 1_000, and digits of other scripts
    return "" if math.isfinite(number) else f"{value!r} is not finite"


def span_fault(answer: Any, passage: str) -> str:
    """Say why an answer is no span of its passage."""
    texts, start = placed_answer(answer, passage)
    if not texts or (start >= 0 and passage[start : start + len(texts[0])] == texts[0]):
        return ""
    return f"the answer {texts[0]!r} does not stand in its passage" + (
        f" at character {start}" if texts[0] in passage else ""
    )


def choice_fault(label: Any, choices: Sequence[str]) -> str:
    """Say why a label is no index of a choice, or a choice is none."""
    if not all(choice.strip() for choice in choices):
        return f"one of its {len(choices)} choices is empty"
    whole = str(label).isdecimal() and not isinstance(label, float)
    return (
        ""
        if whole and int(label) < len(choices)
        else f"{_told(label)} is no index into {len(choices)} choices"
    )


def answers_fault(answers: Any) -> str:
    """Say why a text, or a list of answers, is none."""
    listed = answers if isinstance(answers, list) else [answers]
    if all(answer is not None and answer.strip() for answer in listed) and listed:
        return ""
    return "there is an empty answer" if listed else "there is no answer"


def picture_fault(picture: Any, *, folder: Path) -> str:
    """Say why there is no picture; one that is in the table itself is not opened."""
    if isinstance(picture, str) and not (folder / picture).is_file():
        return f"the picture {str(folder / picture)!r} does not exist"
    return ""


def placed_answer(answer: Any, passage: str) -> tuple[list[str], int]:
    """Return the texts that are right and where the first starts: SQuAD's form may say so, else it is the first place."""
    if isinstance(answer, Mapping):
        texts, starts = answer["text"] or [], answer["answer_start"] or []
    else:
        texts, starts = [answer or ""], []
    if not any(texts):
        return [], -1
    return list(texts), starts[0] if starts else passage.find(texts[0])
