"""A node's records as batches, in an order that every process of the run finds again."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vflair_core import Batch, DataParty, Example, TaskError


def read_texts(file: Path, column: str) -> list[str]:
    """Read the texts of a file: JSON lines, CSV, or plain lines; empty ones are left out.

    Errors name rows and columns, and never what stands in them.

    Raises:
        TaskError: The file is missing, has a row without that column, or no text at all.
    """
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            if file.suffix == ".jsonl":
                texts = [_of_json(line, n, file, column) for n, line in _full(stream)]
            elif file.suffix == ".csv":
                texts = [
                    _of_row(row, n, file, column) for n, row in enumerate(csv.DictReader(stream), 2)
                ]
            else:
                texts = [line.strip() for _, line in _full(stream)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TaskError(f"The records {file} cannot be read: {type(error).__name__}.") from error
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise TaskError(f"{file} has no text. Give a file with a record a line.")
    return texts


def _full(stream: Any) -> list[tuple[int, str]]:
    return [(number, line) for number, line in enumerate(stream, 1) if line.strip()]


def _of_json(line: str, number: int, file: Path, column: str) -> str:
    try:
        row = json.loads(line)
    except ValueError:
        raise TaskError(f"{file}, line {number} is no JSON.") from None
    return _of_row(row, number, file, column)


def _of_row(row: Any, number: int, file: Path, column: str) -> str:
    if not isinstance(row, dict) or not isinstance(row.get(column), str):
        raise TaskError(
            f"{file}, line {number} has no text in the column {column!r}. Name the column in the node config: text=..."
        )
    text: str = row[column]
    return text


class Rows:
    """Which records a step learns from: each epoch all of them, in an order drawn from the seed.

    Args:
        texts: The records.
        size: Records of a step.
        seed: Of the order.
    """

    def __init__(self, texts: Sequence[str], size: int, seed: int) -> None:
        self.texts, self.size, self.seed = texts, size, seed

    def __call__(self, step: int) -> list[str]:
        """The records of step number `step`, which counts from 0."""
        first = step * self.size
        return [self.texts[self._record(n)] for n in range(first, first + self.size)]

    def _record(self, number: int) -> int:
        epoch, place = divmod(number, len(self.texts))
        generator = torch.Generator().manual_seed(self.seed + epoch)
        return int(torch.randperm(len(self.texts), generator=generator)[place])


def batch_of(party: DataParty, texts: Sequence[str], max_length: int) -> Batch:
    """The records as the model reads them, through the data party's defenses."""
    return party.encode([Example(text) for text in texts], max_length=max_length)
