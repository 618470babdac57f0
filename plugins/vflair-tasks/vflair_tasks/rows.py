"""Examples made from a table when they are asked for, and the choice of rows that become examples."""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

from vflair_core import Example, TaskError

if TYPE_CHECKING:
    from datasets import Dataset

AT_ONCE = 32  # rows read together when all are gone through; of pictures no more fit
Make = Callable[[Mapping[str, Any], int], Example]  # (row, its number) -> example


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

    def __iter__(self) -> Iterator[Example]:
        for start in range(0, len(self), AT_ONCE):  # one by one takes several times as long
            numbers = [int(number) for number in self.numbers[start : start + AT_ONCE]]
            columns = self.table[numbers]
            for place, number in enumerate(numbers):
                yield self.make({name: cells[place] for name, cells in columns.items()}, number)


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
) -> tuple[Sequence[int], Sequence[int]]:
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
    sides = (array("I"), array("I"))  # four bytes a row, where a list has 36
    number, limit = 0, share * 2**64
    for batch in table.select_columns([column]).iter(batch_size=1000):
        for text in batch[column]:
            if number in wanted:
                key = f"{seed} {str(text).strip()}".encode()
                digest = hashlib.blake2b(key, digest_size=8).digest()
                sides[int.from_bytes(digest, "big") < limit].append(number)
            number += 1
    if not all(sides):
        raise TaskError(
            f"test_share={share} of {len(numbers)} rows leaves {len(sides[0])} to train and {len(sides[1])} to test. "
            "Give another share or more rows."
        )
    return sides
