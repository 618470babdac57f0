"""Examples of rows of the user's own data, as their columns say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from attrs import evolve

from vflair_core import Example, Span
from vflair_tasks.assembly import Side
from vflair_tasks.checking import label_numbers, placed_answer
from vflair_tasks.columns import Columns
from vflair_tasks.rows import Make
from vflair_tasks.secret_spans import compiled, joined, matched
from vflair_tasks.textvqa import as_picture

Secrets = Callable[[Mapping[str, Any]], "tuple[Span, ...] | None"]  # of a row; None means all


def maker(side: Side, columns: Columns, labels: tuple[str, ...]) -> Make:
    """Return what makes an example of a row of that side."""
    index = (
        label_numbers(side.table, columns.label, labels, where=side.where)
        if columns.kind == "classification"
        else None
    )
    secrets = _secrets(columns, columns.text, columns.private_spans)
    pair_secrets = _secrets(columns, columns.pair, columns.private_pair_spans)

    def make(row: Mapping[str, Any], number: int) -> Example:
        example = Example(
            text=row[columns.text],
            pair=row[columns.pair] if columns.pair else None,
            private=secrets(row),
            private_pair=pair_secrets(row) if columns.pair else None,
            id=f"row-{number}",
        )
        if columns.label:
            example = evolve(example, label=_label(row[columns.label], columns.kind, index))
        if columns.choices:
            example = evolve(example, choices=tuple(row[columns.choices]))
        if columns.answer:
            example = _answered(example, row[columns.answer], columns.kind)
        if columns.image:
            picture = row[columns.image]
            picture = str(columns.folder / picture) if isinstance(picture, str) else picture
            example = evolve(example, images=(as_picture(picture),))
        return example

    return make


def _secrets(columns: Columns, column: str, spans: str) -> Secrets:
    """Return what says where the secrets of a column are."""
    if not columns.marked:
        every = None if column in columns.secret else ()
        return lambda _: every
    patterns = compiled(columns.private_patterns) if column in columns.secret else []

    def found(row: Mapping[str, Any]) -> tuple[Span, ...]:
        given = [(start, end) for start, end in row[spans] or ()] if spans else []
        return joined(given + matched(patterns, row[column]))

    return found


def _label(label: Any, kind: str, index: Mapping[Any, int] | None) -> int | float:
    if index is not None:
        return index[label]
    return float(label) if kind == "regression" else int(label)


def _answered(example: Example, answer: Any, kind: str) -> Example:
    if kind != "question-answering":
        if isinstance(answer, list):
            return evolve(example, answer=answer[0], answers=tuple(answer))
        return evolve(example, answer=answer)
    texts, start = placed_answer(answer, example.pair or "")
    text = texts[0] if texts else ""
    span: Span | None = (start, start + len(text)) if text else None
    answers = tuple(dict.fromkeys(texts)) if isinstance(answer, Mapping) else ()
    return evolve(example, answer=text, answers=answers, span=span)
