"""A user's own data: a csv, tsv, jsonl or parquet file, a folder of them, or a name on the hub.

    [task]
    name = "own"
    options = { data = "my.csv", kind = "classification", text = "review", label = "stars" }

Columns, empty cells and labels are seen to before anything else happens, so a run does not fail half-way over its data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from attrs import evolve

from vflair_core import Example, Span, Task, TaskCard, TaskError
from vflair_tasks.assembly import Choice, Side, assemble, carved, limited, side_of
from vflair_tasks.checking import (
    answers_fault,
    choice_fault,
    class_names,
    empty_cells,
    first_fault,
    label_numbers,
    number_fault,
    picture_fault,
    placed_answer,
    span_fault,
)
from vflair_tasks.columns import Columns, check
from vflair_tasks.offering import Asking, asked, offer
from vflair_tasks.prompts import Prompt
from vflair_tasks.rows import Make
from vflair_tasks.tables import Opened, Source, files_of, from_files, open_split
from vflair_tasks.textvqa import as_picture


def _own(columns: Columns, choice: Choice, asking: Asking) -> Task:
    check(columns, asking)
    train, test = _sides(columns)
    if test is not None and choice.test_share is not None:
        raise TaskError(
            f"{columns.data} has a split {columns.test_split!r}, so nothing is left for test_share="
            f"{choice.test_share}. Leave one of them out."
        )
    labels = tuple(columns.labels)
    if columns.kind == "classification" and not labels:
        labels = class_names(train.table, columns.label, where=train.where)
    for side in (train, test):
        if side is not None:
            _check_rows(side, columns, labels)
    task = assemble(
        carved(train, choice)
        if test is None
        else (
            limited(train, choice.limit, choice.seed),
            limited(test, choice.test_limit, choice.seed),
        ),
        lambda side: _maker(side, columns, labels),
        choice,
        name="own",
        kind=columns.kind,
        labels=labels,
        source=columns.data,
    )
    if asking == Asking():
        return task
    names = {columns.text: "text"} | ({columns.pair: "pair"} if columns.pair else {})
    plain = "\n".join(f"{{{name}}}" for name in names)
    return asked(task, Prompt(plain, names=names), asking, seed=choice.seed)


def _sides(columns: Columns) -> tuple[Side, Side | None]:
    train, test = _opened(columns)
    first = _side("train", train, columns, f"{columns.data}, {columns.train_split}")
    if test is None:
        return first, None
    return first, _side("test", test, columns, f"{columns.data}, {columns.test_split}")


def _side(name: str, opened: Opened, columns: Columns, where: str) -> Side:
    wanted = list(columns.needed.values())
    if columns.empty == "error":
        _refuse_empty(opened, [n for n in wanted if n not in columns.may_be_empty], where)
    alternatives = [(column,) for column in wanted]
    return side_of(name, opened, alternatives, where=where, may_be_empty=columns.may_be_empty)


def _opened(columns: Columns) -> tuple[Opened, Opened | None]:
    place = Path(columns.data).expanduser()
    if place.is_file():
        if (columns.config, columns.train_split, columns.test_split) != ("", "train", "test"):
            raise TaskError(
                f"{place} is one file and has neither splits nor configurations. Give its folder, or leave "
                "config, train_split and test_split out."
            )
        return from_files([place]), None
    source = Source(columns.data, columns.config or None)
    if place.is_dir():
        train = open_split(source, (columns.train_split,), place)
        inner = place / columns.config if columns.config else place
        has_test = bool(files_of(inner, (columns.test_split,)))
        return train, open_split(source, (columns.test_split,), place) if has_test else None
    if "/" not in columns.data or place.suffix or place.is_absolute():
        raise TaskError(
            f"data={columns.data!r} is no file or folder (looked in {Path.cwd()}) and no name on the hub, "
            "which has the form OWNER/NAME."
        )
    train = open_split(source, (columns.train_split,), None)
    if not columns.test_split:
        return train, None
    return train, open_split(source, (columns.test_split,), None)


def _refuse_empty(opened: Opened, columns: Sequence[str], where: str) -> None:
    there = [column for column in columns if column in opened.table.column_names]
    lacking = empty_cells(opened.table, there)
    if lacking:
        row, column = lacking[0]
        more = f", and {len(lacking) - 1} more cells" if len(lacking) > 1 else ""
        raise TaskError(
            f"{where}: row {row} (the first is 0), column {column!r} is empty{more}. "
            'Fill it in, or leave such rows out and count them: empty = "drop".'
        )


def _check_rows(side: Side, columns: Columns, labels: Sequence[str]) -> None:
    """See that every label, answer and picture is one, before anything runs."""
    checks: list[tuple[list[str], Callable[..., str]]] = []
    if columns.kind == "classification":
        label_numbers(side.table, columns.label, labels, where=side.where)
    if columns.kind == "regression":
        checks.append(([columns.label], number_fault))
    if columns.kind == "question-answering":
        checks.append(([columns.answer, columns.pair], span_fault))
    elif columns.answer:
        checks.append(([columns.answer], answers_fault))
    if columns.choices:
        checks.append(([columns.label, columns.choices], choice_fault))
    if (
        columns.image
        and getattr(side.table.features[columns.image], "dtype", "") != "PIL.Image.Image"
    ):
        checks.append(([columns.image], partial(picture_fault, folder=columns.folder)))
    for names, fault in checks:
        first_fault(side.table, side.numbers, names, where=side.where, fault=fault)


def _maker(side: Side, columns: Columns, labels: tuple[str, ...]) -> Make:
    index = (
        label_numbers(side.table, columns.label, labels, where=side.where)
        if columns.kind == "classification"
        else None
    )
    secret = columns.private or (columns.text, columns.pair)

    def make(row: Mapping[str, Any], number: int) -> Example:
        example = Example(
            text=str(row[columns.text]),
            pair=str(row[columns.pair]) if columns.pair else None,
            private=None if columns.text in secret else (),
            private_pair=None if columns.pair in secret else (),
            id=f"row-{number}",
        )
        if columns.label:
            label = row[columns.label]
            label = float(label) if columns.kind == "regression" else label
            example = evolve(example, label=label if index is None else index[label])
        if columns.choices:
            example = evolve(example, choices=tuple(map(str, row[columns.choices])))
        if columns.answer:
            example = _answered(example, row[columns.answer], columns.kind)
        if columns.image:
            picture = row[columns.image]
            picture = str(columns.folder / picture) if isinstance(picture, str) else picture
            example = evolve(example, images=(as_picture(picture),))
        return example

    return make


def _answered(example: Example, answer: Any, kind: str) -> Example:
    if kind != "question-answering":
        if isinstance(answer, (list, tuple)):
            return evolve(example, answer=str(answer[0]), answers=tuple(map(str, answer)))
        return evolve(example, answer=str(answer))
    text, start = placed_answer(answer, example.pair or "")
    span: Span | None = (start, start + len(text)) if text else None
    answers = tuple(answer["text"]) if isinstance(answer, Mapping) else ()
    return evolve(example, answer=text, answers=answers, span=span)


own = offer(
    _own,
    "own",
    TaskCard(kind="classification", metric="accuracy", source="the user", licence="the user's"),
    "Your own data: name the file, the kind and the columns.",
    Columns,
    Choice,
    Asking,
    without=[],
)
