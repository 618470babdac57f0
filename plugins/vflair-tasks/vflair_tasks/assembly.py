"""From opened splits to a task: which rows, of which columns, with which facts; public text on request."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import evolve, field, frozen

from vflair_core import Task, TaskError
from vflair_tasks.checking import column_of, empty_cells
from vflair_tasks.docstrings import docstrings
from vflair_tasks.overlap import grams
from vflair_tasks.rows import Make, Rows, carve, sample
from vflair_tasks.tables import Opened, Source, open_split

if TYPE_CHECKING:
    from datasets import Dataset


SHARE = 0.1


@frozen
class Choice:
    """Which rows of a data set: what every task of this plugin takes as options.

    Args:
        data: Local folder or file; None loads from the hub.
        limit: Train examples, drawn by `seed`; None takes all.
        test_limit: Test examples, likewise.
        seed: Of the draw.
        test_share: Share of the rows to test on, where the source has one split only; None takes 0.1.
        public_characters: Length of the public text (docstrings) to add; 0 adds none.
    """

    data: str | Path | None = None
    limit: int | None = None
    test_limit: int | None = None
    seed: int = 0
    test_share: float | None = None
    public_characters: int = 0


@frozen
class Side:
    """Train or test.

    Attributes:
        name: ``train`` or ``test``.
        where: How error messages call it.
        table: All rows on disk.
        columns: Those that were asked for, as they are called here.
        numbers: Rows that take part.
        facts: For the result.
    """

    name: str
    where: str
    table: Dataset
    columns: tuple[str, ...]
    numbers: Sequence[int]
    facts: Mapping[str, Any] = field(factory=dict)


def open_sides(
    source: Source,
    choice: Choice,
    *,
    columns: Sequence[Sequence[str]],
    train: Sequence[str] = ("train",),
    test: Sequence[str] = ("test",),
    share: bool = False,
) -> tuple[Side, Side]:
    """Open train and test; leave out rows that lack something, and count them.

    Args:
        source: Of the data.
        choice: The user's.
        columns: That no row may lack; of each the names it may have, in the order of preference.
        train: Names the train split may have, the hub's first.
        test: Names the test split may have, likewise.
        share: Whether the source has one split: the test rows are carved from it by `Choice.test_share`, so that
            rows of equal text stay together.

    Raises:
        TaskError: A file, split or column is missing, or no row is left.
    """
    if choice.data is not None and Path(choice.data).is_file() and not share:
        raise TaskError(
            f"data={str(choice.data)!r} is one file, and {source.hub} has a train and a test split. Give the "
            f"folder that holds both ({train[0]} and {test[0]}); the task `own` takes one file."
        )
    opened = open_split(source, train, choice.data)
    first = side_of("train", opened, columns, where=f"{source.hub}, split {train[0]}")
    if share:
        return carved(first, choice)
    other = open_split(source, test, choice.data)
    second = side_of("test", other, columns, where=f"{source.hub}, split {test[0]}")
    return limited(first, choice.limit, choice.seed), limited(
        second, choice.test_limit, choice.seed
    )


def side_of(
    name: str,
    opened: Opened,
    columns: Sequence[Sequence[str]],
    *,
    where: str,
    may_be_empty: Sequence[str] = (),
) -> Side:
    """Return one side of a task, without the rows that lack something; its facts count them."""
    table = opened.table
    if not len(table):
        raise TaskError(f"{where} has no rows. Give it at least one.")
    found = tuple(column_of(table, names, where=where) for names in columns)
    numbers: Sequence[int] = range(len(table))
    facts: dict[str, Any] = {f"{name}_sha256": opened.sha256}
    lacking = empty_cells(table, [name for name in found if name not in may_be_empty])
    if lacking:
        gone = {row for row, _ in lacking}
        numbers = [number for number in numbers if number not in gone]
        facts[f"{name}_rows_dropped_empty"] = len(gone)
        facts[f"{name}_first_dropped"] = "row {}, column {!r}".format(*lacking[0])
    if not numbers:
        raise TaskError(f"{where}: each row lacks {' or '.join(found)}. Give rows that are filled.")
    return Side(name, where, table, found, numbers, facts)


def carved(side: Side, choice: Choice) -> tuple[Side, Side]:
    """Deal the rows of one side to train and test."""
    share = SHARE if choice.test_share is None else choice.test_share
    # The first column is the text: rows that only differ in their answers stay together too.
    train, test = carve(side.table, side.numbers, side.columns[0], share=share, seed=choice.seed)
    facts = {**side.facts, "test_share": share}
    return (
        limited(evolve(side, numbers=train, facts=facts), choice.limit, choice.seed),
        limited(evolve(side, name="test", numbers=test, facts={}), choice.test_limit, choice.seed),
    )


def limited(side: Side, limit: int | None, seed: int) -> Side:
    """Draw at most `limit` rows of a side."""
    option = "limit" if side.name == "train" else "test_limit"
    return evolve(side, numbers=sample(side.numbers, limit, seed=seed, option=option))


def assemble(
    sides: tuple[Side, Side],
    maker: Callable[[Side], Make],
    choice: Choice,
    **fields: Any,
) -> Task:
    """Return the task, its examples made when they are asked for.

    Args:
        sides: Train and test.
        maker: Returns what makes an example of a row of that side.
        choice: The user's.
        fields: Those of `Task`; `facts` are added to the sides'.
    """
    train, test = (Rows(side.table, maker(side), side.numbers) for side in sides)
    facts = {**sides[0].facts, **sides[1].facts, **fields.pop("facts", {})}
    facts |= {"train_rows": len(train), "test_rows": len(test)}
    return with_docstrings(
        Task(train=train, test=test, facts=facts, **fields), choice.public_characters
    )


def with_docstrings(task: Task, characters: int) -> Task:
    """Add at most `characters` of docstrings that share no 13 words in a row with an example.

    Goes through all examples once, in constant memory; with 0 characters through none.
    """
    if not characters:
        return task
    kept, rest = [], characters
    for text in docstrings():
        rest -= len(text)
        if rest < 0:
            break
        kept.append(text)
    owners: dict[tuple[str, ...], list[int]] = {}
    for number, text in enumerate(kept):
        for gram in grams(text):
            owners.setdefault(gram, []).append(number)
    shared: set[int] = set()
    for split in (task.train, task.test):
        for example in split:
            for text in (example.text, example.pair or "", *example.accepted):
                for gram in grams(text):
                    shared.update(owners.get(gram, ()))
    public = [text for number, text in enumerate(kept) if number not in shared]
    facts = {
        **task.facts,
        "public_documents": len(public),
        "public_documents_removed_for_overlap": len(shared),
    }
    return evolve(task, public=public, facts=facts)
