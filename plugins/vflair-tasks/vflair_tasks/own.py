"""A user's own data: a csv, tsv, txt, jsonl, json or parquet file, a folder of them, or a name on the hub.

    [task]
    name = "own"
    options = { data = "my.csv", kind = "classification", text = "review", label = "stars" }

Columns, cells and labels are seen to before anything else happens, so a run does not fail half-way over its data. Text is what
the file has: nothing is taken for a number, a date, a truth value or nothing at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from attrs import evolve

from vflair_core import Task, TaskCard, TaskError
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
    span_fault,
)
from vflair_tasks.columns import Columns, check
from vflair_tasks.comparison import METRICS, comparison_fault
from vflair_tasks.offering import Asking, asked, offer
from vflair_tasks.own_rows import maker
from vflair_tasks.own_table import FLAT, READ, header_of, table_of_files, table_of_table
from vflair_tasks.prompts import Prompt
from vflair_tasks.secret_spans import spans_fault
from vflair_tasks.tables import Opened, Source, files_of, from_files, open_split


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
        lambda side: maker(side, columns, labels),
        choice,
        name="own",
        kind=columns.kind,
        labels=labels,
        score=METRICS[columns.metric],
        source=columns.data,
    )
    if columns.marked:
        task = _with_secrets(task)
    if asking == Asking():
        return task
    names = {columns.text: "text"} | ({columns.pair: "pair"} if columns.pair else {})
    # Not the columns' own names: those may have braces and colons.
    plain = {"its text": "text"} | ({"its pair": "pair"} if columns.pair else {})
    template = "\n".join(f"{{{name}}}" for name in plain)
    return asked(task, Prompt(template, names=plain | names), asking, seed=choice.seed)


# -- what there is ---------------------------------------------------------------------------------------------


def _sides(columns: Columns) -> tuple[Side, Side | None]:
    train, test = _opened(columns)
    first = _side("train", train, columns, f"{columns.data}, {columns.train_split}")
    if test is None:
        return first, None
    return first, _side("test", test, columns, f"{columns.data}, {columns.test_split}")


def _side(name: str, opened: Opened, columns: Columns, where: str) -> Side:
    wanted = list(columns.used.values())
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
        return _read([place], columns), None
    source = Source(columns.data, columns.config or None)
    if place.is_dir():
        inner = place / columns.config if columns.config else place
        train = files_of(inner, (columns.train_split,))
        test = files_of(inner, (columns.test_split,))
        if not train:
            open_split(source, (columns.train_split,), place)  # says what is there instead
        return _read(train, columns), _read(test, columns) if test else None
    if "/" not in columns.data or place.suffix or place.is_absolute():
        raise TaskError(
            f"data={columns.data!r} is no file or folder (looked in {Path.cwd()}) and no name on the hub, "
            "which has the form OWNER/NAME."
        )
    train_side = _typed(open_split(source, (columns.train_split,), None), columns)
    if not columns.test_split:
        return train_side, None
    return train_side, _typed(open_split(source, (columns.test_split,), None), columns)


def _read(files: Sequence[Path], columns: Columns) -> Opened:
    """Read files of text as they are written; a parquet file has types of its own."""
    ending = files[0].suffix.lower()
    flat = ending in FLAT
    if not flat or ending == ".txt":
        for option in ("separator", "quoting"):
            if getattr(columns, option):
                raise TaskError(
                    f"{option} = {getattr(columns, option)!r} says how csv and tsv are written, and {files[0].name} is "
                    "neither. Leave it out."
                )
    if ending in READ:
        names = header_of(files[0], columns.writing)
        return table_of_files(files, columns.uses(names, flat=flat), columns.writing)
    if columns.encoding != "utf-8":
        raise TaskError(
            f"encoding = {columns.encoding!r} is of files of text, and {files[0].name} is none. Leave it out."
        )
    return _typed(from_files(files), columns)


def _typed(opened: Opened, columns: Columns) -> Opened:
    """Take a table with types as it is where they say all, and what its cells say elsewhere."""
    uses = columns.uses(opened.table.column_names)
    return table_of_table(opened, uses, columns.data)


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


# -- what can be used ------------------------------------------------------------------------------------------


def _check_rows(side: Side, columns: Columns, labels: Sequence[str]) -> None:
    """See that every label, answer, span and picture is one, before anything runs."""
    checks: list[tuple[list[str], Callable[..., str]]] = []
    if columns.kind == "classification":
        label_numbers(side.table, columns.label, labels, where=side.where)
    if columns.kind == "regression":
        checks.append(([columns.label], number_fault))
    if columns.kind == "question-answering":
        checks.append(([columns.answer, columns.pair], span_fault))
    elif columns.answer:
        checks.append(([columns.answer], answers_fault))
        if METRICS[columns.metric] is not None:
            checks.append(([columns.answer], partial(_uncomparable, columns.metric)))
    if columns.choices:
        checks.append(([columns.label, columns.choices], choice_fault))
    if columns.private_spans:
        checks.append(([columns.private_spans, columns.text], spans_fault))
    if columns.private_pair_spans:
        checks.append(([columns.private_pair_spans, columns.pair], spans_fault))
    if (
        columns.image
        and getattr(side.table.features[columns.image], "dtype", "") != "PIL.Image.Image"
    ):
        checks.append(([columns.image], partial(picture_fault, folder=columns.folder)))
    for names, fault in checks:
        first_fault(side.table, side.numbers, names, where=side.where, fault=fault)


def _uncomparable(metric: str, answer: Any) -> str:
    return comparison_fault(metric, answer if isinstance(answer, list) else [answer])


def _with_secrets(task: Task) -> Task:
    """Count the examples without a secret; refuse a task of them."""
    facts = {}
    for split in ("train", "test"):
        examples = getattr(task, split)
        without = sum(not example.secrets for example in examples)
        if without == len(examples):
            raise TaskError(
                f"private_patterns and private spans mark nothing in any of the {without} {split} examples, so there is "
                'no secret to recover. Try the patterns on a text: python -c "import re; print(re.findall(…))".'
            )
        facts[f"{split}_examples_without_secrets"] = without
    return evolve(task, facts={**task.facts, **facts})


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
