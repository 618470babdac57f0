"""Rows of csv, tsv and txt files, every cell as text; what does not fit is an error that guesses how the file is meant."""

from __future__ import annotations

import codecs
import csv
import itertools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from attrs import evolve, frozen

from vflair_core import TaskError

Cells = list[str]
SEPARATORS = {".csv": ",", ".tsv": "\t"}
QUOTING: dict[str, dict[str, Any]] = {
    "double": {"quoting": csv.QUOTE_MINIMAL, "doublequote": True, "strict": True},
    "backslash": {
        "quoting": csv.QUOTE_MINIMAL,
        "doublequote": False,
        "escapechar": "\\",
        "strict": True,
    },
    "none": {"quoting": csv.QUOTE_NONE},
}
AT_ONCE = 500  # rows that are parsed together; more of them leave the cache of the processor
TRIED = 2000  # rows that are looked at for a guess
_BYTE_ORDERS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


@frozen
class Writing:
    """How a file is written.

    Args:
        separator: Between cells; "" takes the comma of csv or the tab of tsv.
        quoting: ``double`` (cells in quotes, a quote in them twice), ``backslash`` (a quote in them behind one) or ``none``
            (a quote is a sign like others); "" takes ``double`` for csv and ``none`` for tsv.
        encoding: Of the text; a byte order mark of utf-8 is no part of it.
    """

    separator: str = ""
    quoting: str = ""
    encoding: str = "utf-8"

    def of(self, file: Path) -> Writing:
        """Return the same with what the ending of a file says where nothing was said."""
        ending = file.suffix.lower()
        return evolve(
            self,
            separator=self.separator or SEPARATORS.get(ending, ","),
            quoting=self.quoting or ("none" if ending == ".tsv" else "double"),
        )


def check_writing(writing: Writing) -> None:
    """See that the options mean something.

    Raises:
        TaskError: They do not.
    """
    if writing.quoting and writing.quoting not in QUOTING:
        raise TaskError(f"quoting={writing.quoting!r} is unknown. Possible: {', '.join(QUOTING)}.")
    if writing.separator and (len(writing.separator) != 1 or writing.separator in '"\r\n'):
        raise TaskError(
            f'separator={writing.separator!r} is not one sign that may stand between cells. Try "," or "\\t" or ";".'
        )
    try:
        codecs.lookup(writing.encoding)
    except LookupError as error:
        raise TaskError(
            f'encoding={writing.encoding!r} is unknown. Try "utf-8", "utf-16", "cp1252" or "latin-1".'
        ) from error


def header_and_rows(file: Path, writing: Writing) -> tuple[Cells, Iterator[list[Cells]]]:
    """Return the header of a csv or tsv file and an iterator over its rows, many at once, each as long as the header.

    Empty lines are no rows, but for those of a single column between others.

    Raises:
        TaskError: The file is not written so; also while it is iterated. The message names the row.
    """
    parts = _parsed(file, writing.of(file))
    first: list[Cells] = next(parts, [[]])
    header = first[0]
    if not any(cell.strip() for cell in header):
        raise TaskError(f"{file} is empty. Give a file with a header and at least one row.")
    return header, _checked(file, writing, header, itertools.chain([first[1:]], parts))


def lines_of(file: Path, encoding: str) -> Iterator[str]:
    """Yield the lines of a text file without their ends.

    Raises:
        TaskError: A line is not in that encoding; the message names it.
    """
    name = "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding
    try:
        with file.open(encoding=name, newline="") as stream:
            for line in stream:
                yield line.rstrip("\r\n")
    except UnicodeError as error:
        raise _undecodable(file, encoding) from error


def _parsed(file: Path, writing: Writing) -> Iterator[list[Cells]]:
    """Yield rows as they are parsed, many at once, the header first, empty lines as ``[]``."""
    try:
        with _opened(file, writing) as rows:
            while part := list(itertools.islice(rows, AT_ONCE)):
                yield part
    except UnicodeError as error:
        raise _undecodable(file, writing.encoding) from error
    except csv.Error as error:
        reason = f"a quote opens a cell and is not closed at its end ({error})"
        raise _does_not_parse(file, writing, _parsable(file, writing) - 1, reason) from error


def _parsable(file: Path, writing: Writing) -> int:
    """Count the rows, header included, before the one that does not parse."""
    number = 0
    with _opened(file, writing) as rows, suppress(csv.Error, UnicodeError):
        for row in rows:
            number += bool(row)
    return number


@contextmanager
def _opened(file: Path, writing: Writing) -> Iterator[Iterator[Cells]]:
    name = "utf-8-sig" if codecs.lookup(writing.encoding).name == "utf-8" else writing.encoding
    with file.open(encoding=name, newline="") as stream, _cells_of_any_length():
        yield csv.reader(stream, delimiter=writing.separator, **QUOTING[writing.quoting])


@contextmanager
def _cells_of_any_length() -> Iterator[None]:
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _checked(
    file: Path, writing: Writing, header: Cells, parts: Iterator[list[Cells]]
) -> Iterator[list[Cells]]:
    wary = writing.of(file).quoting == "none" and not writing.quoting
    number = blank = 0
    for part in parts:
        rows = part
        if len(header) == 1:  # an empty line is an empty cell, unless it is one of the last
            rows = [[]] * blank + part
            blank = next((n for n, row in enumerate(reversed(rows)) if row), len(rows))
            rows = [row or [""] for row in rows[: len(rows) - blank]]
        elif not all(part):
            rows = [row for row in part if row]
        if set(map(len, rows)) - {len(header)}:
            at = next(n for n, row in enumerate(rows) if len(row) != len(header))
            reason = f"it has {_count(rows[at])} and the header has {len(header)}"
            raise _does_not_parse(file, writing.of(file), number + at, reason)
        if wary:
            _refuse_quotes(file, rows, number)
        if rows:
            yield rows
        number += len(rows)


def _refuse_quotes(file: Path, rows: Sequence[Cells], first: int) -> None:
    """Refuse cells of a tsv that look as if they were quoted by a program; nobody said whether they are."""
    for number, row in enumerate(rows, first):
        everywhere = len(row) > 1 and all(len(c) > 1 and c[0] == c[-1] == '"' for c in row)
        cell = row[0] if everywhere else next(filter(_is_quoted, row), None)
        if cell is not None:
            raise TaskError(
                f"{file}, row {number} (the first is 0): the cell {cell[:60]} looks quoted, and in a tsv a quote is a "
                'sign like others. Say what it is: quoting = "double" if quotes are put around cells, quoting = "none" if '
                "they are part of the text."
            )


def _is_quoted(cell: str) -> bool:
    '''Whether a cell was quoted because there are quotes in it, as spreadsheets do: "he said ""no""".'''
    inner = cell[1:-1]
    return (
        len(cell) > 3
        and cell[0] == cell[-1] == '"'
        and '""' in inner
        and '"' not in inner.replace('""', "")
    )


def _count(row: Sequence[str]) -> str:
    return "1 cell" if len(row) == 1 else f"{len(row)} cells"


# -- what a file may have meant --------------------------------------------------------------------------------


def _does_not_parse(file: Path, writing: Writing, number: int, reason: str) -> TaskError:
    place = "its header" if number < 0 else f"row {number} (the first is 0)"
    return TaskError(
        f"{file} does not parse as {file.suffix[1:]} with {_told(writing)}: {place}: {reason}.{guess(file, writing)} "
        "Repair the file or say how it is written; nothing of it was kept."
    )


def guess(file: Path, writing: Writing) -> str:
    """Return a sentence on how else the file could be written so that all rows fit, or nothing."""
    writing = writing.of(file)
    separators = dict.fromkeys([writing.separator, ",", ";", "\t", "|"])
    for separator, quoting in itertools.product(separators, QUOTING):
        other = evolve(writing, separator=separator, quoting=quoting)
        cells = 0 if other == writing else _fitting(file, other)
        if cells > 1:
            return f" With {_told(other)} every row has {cells} cells."
    return ""


def _told(writing: Writing) -> str:
    separator = {"\t": "\\t"}.get(writing.separator, writing.separator)
    return f'separator = "{separator}", quoting = "{writing.quoting}"'


def _fitting(file: Path, writing: Writing) -> int:
    """Return the number of cells of every row if it is the same for all that are looked at, else 0."""
    try:
        with _opened(file, writing) as lines:
            rows = [row for row in itertools.islice(lines, TRIED) if row]
    except (csv.Error, UnicodeError):
        return 0
    counts = {len(row) for row in rows}
    return counts.pop() if len(counts) == 1 else 0


def _undecodable(file: Path, encoding: str) -> TaskError:
    number, line = 0, b""
    with file.open("rb") as stream:
        start = stream.read(4)
        stream.seek(0)
        for place, raw in enumerate(stream):
            try:
                raw.decode(encoding)
            except UnicodeError:
                number, line = place, raw
                break
    likely = next((name for mark, name in _BYTE_ORDERS.items() if start.startswith(mark)), None)
    if likely is None:
        try:
            line.decode("cp1252")
            likely = "cp1252"
        except UnicodeError:
            likely = "latin-1"
    try:
        text = line.decode(likely, errors="replace").strip()[:40]
    except UnicodeError:  # half of a sign of two bytes
        text = ""
    return TaskError(
        f'{file}, line {number} (the first is 0) is not text in the encoding {encoding}. In encoding = "{likely}" it '
        f"reads {text!r}: set that if it is right, or convert the file to utf-8."
    )
