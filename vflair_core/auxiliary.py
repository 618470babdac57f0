"""What an attacker may be granted beside messages and weights: public text, and examples that are no victims."""

from __future__ import annotations

from typing import Any

import attrs

from vflair_core.experiment import Victims
from vflair_core.task import Example, Task

IN_DOMAIN, LABELLED = 64, 16  # examples


def auxiliary_of(task: Task, victims: Victims) -> dict[str, Any]:
    """Return everything there is by its name in the vocabulary, as plain values."""
    first = victims.count if victims.split == "train" else 0
    last = min(first + IN_DOMAIN, len(task.train))
    others = [task.row("train", n) for n in range(first, last)]
    auxiliary = {
        "public_texts": list(task.public),
        "in_domain": [example.text for example in others],
        "few_labelled": [_plain(example) for example in others[:LABELLED]],
        "queries": list(task.public[: victims.queries]),
    }
    return {name: rows for name, rows in auxiliary.items() if rows}


def _plain(example: Example) -> dict[str, Any]:
    """What a file of JSON can hold of an example: all but its pictures."""
    return attrs.asdict(attrs.evolve(example, images=()))
