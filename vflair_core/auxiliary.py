"""What an attacker may be granted beside messages and weights: public text, and examples that are no victims."""

from __future__ import annotations

from typing import Any

import attrs
import torch
from torch import Tensor

from vflair_core.attacks.worker import stream_seed
from vflair_core.errors import ExperimentError
from vflair_core.experiments.experiment import Victims
from vflair_core.tasks.task import Example, Task

IN_DOMAIN, LABELLED = 64, 16  # examples


def auxiliary_of(task: Task, victims: Victims, seed: int) -> dict[str, Any]:
    """Return everything there is by its name in the vocabulary, as plain values."""
    first = victims.count if victims.split == "train" else 0
    last = min(first + IN_DOMAIN, len(task.train))
    others = [task.row("train", n) for n in range(first, last)]
    seen = [task.row(victims.split, n) for n in range(victims.known)]
    auxiliary = {
        "public_texts": list(task.public),
        "in_domain": [example.text for example in others],
        "few_labelled": [_plain(example) for example in others[:LABELLED]],
        "queries": list(task.public[: victims.queries]),
        "known_labels": [[n, example.label] for n, example in enumerate(seen)],
        "candidates": candidates_of(task, victims, seed)[0],
    }
    return {name: rows for name, rows in auxiliary.items() if rows}


def candidates_of(task: Task, victims: Victims, seed: int) -> tuple[list[str], Tensor | None]:
    """Return texts of which half are victims, shuffled, and which victim each is (-1 for none).

    The others come from the end of the other split, and were never trained on if the victims were.

    Raises:
        ExperimentError: The other split has too few texts.
    """
    half = victims.candidates // 2
    if not half:
        return [], None
    other = "test" if victims.split == "train" else "train"
    there = len(getattr(task, other))
    if there < half:
        raise ExperimentError(
            f"victims.candidates = {victims.candidates} needs {half} {other} examples, and task {task.name!r} "
            f"has {there}."
        )
    inside = [task.row(victims.split, n).text for n in range(half)]  # type: ignore[arg-type]
    outside = [task.row(other, there - 1 - n).text for n in range(half)]  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(stream_seed(seed, "candidates"))
    order = torch.randperm(2 * half, generator=generator).tolist()
    texts = inside + outside
    return [texts[n] for n in order], torch.tensor([n if n < half else -1 for n in order])


def _plain(example: Example) -> dict[str, Any]:
    """What a file of JSON can hold of an example: all but its pictures."""
    return attrs.asdict(attrs.evolve(example, images=()))
