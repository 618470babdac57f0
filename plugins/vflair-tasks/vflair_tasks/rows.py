"""Examples made from a table when they are asked for, and the checks that go through whole columns first."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

from vflair_core import Example
from vflair_core.errors import TaskError, did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset

Make = Callable[[Mapping[str, Any], int], Example]  # (row, its number) -> example
MOST_CLASSES = 1000


class Rows(Sequence[Example]):
    """A view of a memory-mapped table: nothing is read before it is asked for, nothing is kept after.

    Args:
        table: On disk.
        make: Makes an example of a row and its number in the table.
        numbers: Which rows, in which order; None takes all.
    """

    def __init__(self, table: Dataset, make: Make, numbers: Sequence[int] | None = None) -> None:
        self.table = table
        self.make = make
        self.numbers = range(len(table)) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Rows: ...
    def __getitem__(self, index: int | slice) -> Example | Rows:
        if isinstance(index, slice):
            return Rows(self.table, self.make, self.numbers[index])
        number = int(self.numbers[index])
        return self.make(self.table[number], number)


class View(Sequence[Example]):
    """Some of the examples of a sequence, by their numbers."""

    def __init__(self, examples: Sequence[Example], numbers: Sequence[int]) -> None:
        self.examples = examples
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> View: ...
    def __getitem__(self, index: int | slice) -> Example | View:
        if isinstance(index, slice):
            return View(self.examples, self.numbers[index])
        return self.examples[self.numbers[index]]


def sample(numbers: Sequence[int], limit: int | None, *, seed: int, option: str) -> Sequence[int]:
    """Return `limit` of `numbers`, drawn without replacement by `seed`; all, in their order, if None.

    Raises:
        TaskError: The limit is below 1.
    """
    if limit is None:
        return numbers
    if limit < 1:
        raise TaskError(f"{option}={limit} leaves nothing. Ask for 1 example or more.")
    if limit >= len(numbers):
        return numbers
    return [
        numbers[n] for n in random.Random(f"{option} {seed}").sample(range(len(numbers)), limit)
    ]


def carve(
    table: Dataset, numbers: Sequence[int], column: str, *, share: float, seed: int
) -> tuple[list[int], list[int]]:
    """Deal the rows of one table to train and test by a hash of their text, so that equal texts stay together.

    Args:
        table: All rows.
        numbers: Those to deal.
        column: Of the text: rows that are equal in it, but for space around it, go to the same side.
        share: Expected share of the test side.
        seed: Another seed deals otherwise.

    Raises:
        TaskError: The share is not between 0 and 1, or leaves a side empty.
    """
    if not 0 < share < 1:
        raise TaskError(
            f"test_share={share} leaves a split empty. It must lie between 0 and 1; try 0.1."
        )
    wanted = numbers if isinstance(numbers, range) else set(numbers)
    sides: tuple[list[int], list[int]] = ([], [])
    number = 0
    for batch in table.select_columns([column]).iter(batch_size=1000):
        for text in batch[column]:
            if number in wanted:
                key = f"{seed} {str(text).strip()}".encode()
                digest = hashlib.blake2b(key, digest_size=8).digest()
                sides[int.from_bytes(digest, "big") < share * 2**64].append(number)
            number += 1
    if not all(sides):
        raise TaskError(
            f"test_share={share} of {len(numbers)} rows leaves {len(sides[0])} to train and {len(sides[1])} to test. "
            "Give another share or more rows."
        )
    return sides


def column_of(table: Dataset, names: Sequence[str], *, where: str) -> str:
    """Return the first of `names` that the table has as a column.

    Raises:
        TaskError: It has none of them, or no row.
    """
    for name in names:
        if name in table.column_names:
            return name
    hint = did_you_mean(names[0], table.column_names)
    raise TaskError(
        f"{where} has no column {' or '.join(map(repr, names))}. It has {', '.join(table.column_names)}.{hint}"
    )


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
    if any(isinstance(value, float) and not value.is_integer() for value in values):
        raise TaskError(
            f"{where}, column {column!r} holds fractions such as {values[0]!r}, which are no classes. "
            'Set kind = "regression".'
        )
    if not 1 < len(values) <= MOST_CLASSES:
        raise TaskError(
            f"{where}, column {column!r} has {len(values)} distinct values; classes are 2 to {MOST_CLASSES}. "
            'Choose another label column, or another kind, e.g. "regression".'
        )
    return tuple(_name(value) for value in sorted(values))


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
    found: dict[Any, int] = {}
    for value in pc.unique(cells).to_pylist():
        if value is None or not str(value).strip():
            continue  # empty cells are another check's business
        name = _name(value)
        if not has_names and name in index:
            found[value] = index[name]
        elif name.isdigit() and int(name) < len(
            labels
        ):  # also text: one empty cell makes a column text
            found[value] = int(name)
        else:
            row = pc.index(cells, value).as_py()
            raise TaskError(
                f"{where}, row {row} (the first is 0), column {column!r}: {value!r} is none of the "
                f"{len(labels)} labels {', '.join(labels[:20])}. Correct it, or name all classes: labels = [...]."
            )
    return found


def _name(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) else str(value)
