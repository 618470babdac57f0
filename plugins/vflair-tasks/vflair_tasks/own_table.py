"""The user's files as one table on disk: of each column that is used what its cells say, and nothing that was guessed.

The table is written once, as Arrow in the cache of the `datasets` library, under the contents of the files and what is
asked of them, and mapped from there.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vflair_core import TaskError, alternatives
from vflair_tasks.cells import CellError, Use
from vflair_tasks.delimited import Writing, guess, header_and_rows, lines_of
from vflair_tasks.json_rows import rows_of
from vflair_tasks.tables import Opened, digest_of

if TYPE_CHECKING:
    from datasets import Dataset

Batch = tuple[int, dict[str, Sequence[Any]]]  # (number of its first row, cells by column)
FORMAT = 1  # of what is written: another one is not taken from the cache
AT_ONCE = 2000  # rows of a batch
FLAT = (".csv", ".tsv", ".txt")  # every cell is text
READ = (*FLAT, ".json", ".jsonl")


def table_of_files(files: Sequence[Path], uses: Sequence[Use], writing: Writing) -> Opened:
    """Return what the columns say that are used; columns of the table are named by the option that asked for them.

    Raises:
        TaskError: A file or a cell cannot be read; the message names file, row and column.
    """
    for file in files:
        if not file.stat().st_size:
            raise TaskError(f"{file} is empty. Give a file with a header and at least one row.")
    digest = digest_of(files)
    batches = (batch for file in files for batch in _converted(file, uses, writing))
    table = _written(batches, uses, [digest, writing, files[0].suffix.lower()])
    if not len(table):
        raise TaskError(f"{files[0]} has no rows. Give it at least one.")
    return Opened(table, digest)


def header_of(file: Path, writing: Writing) -> Sequence[str]:
    """Return the columns of a file, as far as it says them before its rows."""
    if not file.stat().st_size:
        raise TaskError(f"{file} is empty. Give a file with a header and at least one row.")
    if file.suffix.lower() == ".txt":
        return ["text"]
    if file.suffix.lower() in FLAT:
        return header_and_rows(file, writing)[0]
    return list(next(rows_of(file, writing.encoding), {}))


def table_of_table(opened: Opened, uses: Sequence[Use], where: str) -> Opened:
    """Return the same of a table whose cells have types: of a parquet file, or of the hub.

    Columns whose types say all stay as they are; pictures always do.
    """
    from datasets import concatenate_datasets

    for use in uses:
        _check_column(use.column, opened.table.column_names, where)
    other = [use for use in uses if not _says_all(use, opened.table.features[use.column])]
    if not other:
        return opened

    def batches() -> Iterator[Batch]:
        first, names = 0, sorted({use.column for use in other})
        for batch in opened.table.select_columns(names).iter(batch_size=AT_ONCE):
            yield (
                first,
                {u.option: _said(u, batch[u.column], first, where, flat=False) for u in other},
            )
            first += len(batch[names[0]])

    key = [opened.sha256, opened.table._fingerprint]  # noqa: SLF001  # of the rows that were chosen
    table = _written(batches(), other, key)
    same = [use.column for use in uses if use not in other]
    if same:
        table = concatenate_datasets([table, opened.table.select_columns(same)], axis=1)
    return Opened(table, opened.sha256)


def _says_all(use: Use, feature: Any) -> bool:
    """Whether cells of this type are what they are used for without a word."""
    if use.steps:
        return False
    if use.role == "image":
        return True
    kind, names = getattr(feature, "dtype", ""), getattr(feature, "names", None)
    if use.role == "label":
        return (
            bool(names) or kind in ("string", "large_string") or kind[:3] in ("int", "uin", "flo")
        )
    inner = getattr(getattr(feature, "feature", None), "dtype", "")
    texts = use.role in ("answer", "choices") and inner in ("string", "large_string")
    return texts or (use.role in ("text", "answer") and kind in ("string", "large_string"))


def _converted(file: Path, uses: Sequence[Use], writing: Writing) -> Iterator[Batch]:
    flat = file.suffix.lower() in FLAT
    source = _delimited(file, uses, writing) if flat else _objects(file, uses, writing)
    for first, cells in source:
        yield (
            first,
            {
                use.option: _said(use, cells[use.column], first, str(file), flat=flat)
                for use in uses
            },
        )


def _delimited(file: Path, uses: Sequence[Use], writing: Writing) -> Iterator[Batch]:
    header: Sequence[str]
    if file.suffix.lower() == ".txt":
        header, rows = ["text"], _each_a_row(lines_of(file, writing.encoding))
    else:
        header, rows = header_and_rows(file, writing)
    names = {use.column for use in uses}
    hint = guess(file, writing) if len(header) == 1 and names - set(header) else ""
    for name in names:
        _check_column(name, header, str(file), hint)
    first = 0
    for batch in rows:
        columns = dict(zip(header, zip(*batch, strict=True), strict=True))
        yield first, {name: columns[name] for name in names}
        first += len(batch)


def _each_a_row(lines: Iterator[str]) -> Iterator[list[list[str]]]:
    while batch := [[line] for line in islice(lines, AT_ONCE)]:
        yield batch


def _objects(file: Path, uses: Sequence[Use], writing: Writing) -> Iterator[Batch]:
    rows, first = rows_of(file, writing.encoding), 0
    names = {use.column for use in uses}
    seen: dict[str, None] = {}
    while batch := list(islice(rows, AT_ONCE)):
        for row in batch:
            if row.keys() - seen.keys():
                seen |= dict.fromkeys(row)
        yield first, {name: [row.get(name) for row in batch] for name in names}
        first += len(batch)
    for name in names if first else ():
        _check_column(name, list(seen), str(file))


def _check_column(name: str, header: Sequence[str], where: str, hint: str = "") -> None:
    """See that a column is there, and once."""
    count = list(header).count(name)
    if not count:
        raise TaskError(
            f"{where} has no column {name!r}.{alternatives(name, header, label='It has')}{hint}"
        )
    if count > 1:
        raise TaskError(
            f"{where} has the column {name!r} {count} times, and it is not known which is meant. Rename all but one."
        )


def _said(use: Use, cells: Sequence[Any], first: int, where: str, *, flat: bool) -> Any:
    """Return what the cells of a batch say, as they go into the table."""
    plain = use.role in ("text", "label", "image") and not use.steps
    if plain and flat:
        return cells
    said = list(cells)
    for n, cell in enumerate(cells):
        if plain and (cell.__class__ is str or cell is None):  # of most columns nearly all
            continue
        try:
            said[n] = use(cell, flat=flat)
        except CellError as error:
            raise TaskError(
                f"{where}, row {first + n} (the first is 0), column {use.option!r}: {error}."
            ) from error
    return said


# -- on disk ---------------------------------------------------------------------------------------------------


def _types(uses: Sequence[Use]) -> Mapping[str, Any]:
    import pyarrow as pa

    text, place = pa.large_string(), pa.int64()
    of_role = {
        "answer": pa.list_(text),
        "choices": pa.list_(text),
        "placed": pa.struct({"text": pa.list_(text), "answer_start": pa.list_(place)}),
        "spans": pa.list_(pa.list_(place)),
    }
    return {use.option: of_role.get(use.role, text) for use in uses}


def _written(batches: Iterator[Batch], uses: Sequence[Use], key: Sequence[Any]) -> Dataset:
    """Write batches to a file of the cache, unless it is there, and map it."""
    import pyarrow as pa
    from datasets import Dataset, config

    name = hashlib.sha256(repr([FORMAT, *key, sorted(map(repr, uses))]).encode()).hexdigest()
    folder = Path(config.HF_DATASETS_CACHE) / "vflair-own"
    place = folder / f"{name}.arrow"
    if place.is_file():
        return Dataset.from_file(str(place))
    schema = pa.schema(list(_types(uses).items()))
    folder.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=folder, suffix=".part")
    os.close(handle)
    try:
        with pa.OSFile(aside, "wb") as sink, pa.ipc.new_stream(sink, schema) as stream:
            for first, cells in batches:
                stream.write_batch(_batch(cells, schema, first))
        Path(aside).replace(place)
    finally:
        Path(aside).unlink(missing_ok=True)
    return Dataset.from_file(str(place))


def _batch(cells: Mapping[str, Sequence[Any]], schema: Any, first: int) -> Any:
    import pyarrow as pa

    try:
        columns = [pa.array(cells[field.name], field.type) for field in schema]
    except UnicodeEncodeError as error:
        for name, column in cells.items():
            for n, cell in enumerate(column):
                if _is_broken(cell):
                    raise TaskError(
                        f"Row {first + n} (the first is 0), column {name!r}: {str(cell)[:40]!r} holds half a sign (a lone "
                        "surrogate), which is no text. Take it away."
                    ) from error
        raise
    return pa.record_batch(columns, schema=schema)


def _is_broken(cell: Any) -> bool:
    try:
        json.dumps(cell, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False
