"""What a run found: numbers that equal seeds reproduce, and what it cost."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
from attrs import field, frozen

if TYPE_CHECKING:
    from vflair_core.tasks.task import Task


@frozen
class Result:
    """The outcome of one experiment.

    `numbers` holds, per arm (``undefended``, ``defended``), main-task performance, grades, guarantee and
    losses; equal experiments give equal numbers. `cost` holds bytes, messages and seconds. `samples` are
    private sentences beside what each attack recovered: look at them, do not publish them. A file that is not
    `finished` holds the arms that were done when it was written.
    """

    numbers: dict[str, Any]
    cost: dict[str, Any]
    experiment: dict[str, Any]
    config_hash: str
    versions: dict[str, str] = field(factory=dict)
    plugins: list[dict[str, Any]] = field(factory=list)
    task: dict[str, Any] = field(factory=dict)
    samples: list[dict[str, Any]] = field(factory=list)
    finished: bool = True

    @property
    def numbers_hash(self) -> str:
        """Hash of `numbers`."""
        text = json.dumps(self.numbers, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_json(self, path: str | Path | None = None) -> str:
        """Return the result as JSON, and write it to `path` when one is given."""
        text = json.dumps({**attrs.asdict(self), "numbers_hash": self.numbers_hash}, indent=2)
        if path is not None:
            Path(path).write_text(text + "\n")
        return text


def facts_of(task: Task) -> dict[str, Any]:
    """What a result says of its task: name, kind, where its texts are from, and what the task adds."""
    facts = {"name": task.name, "kind": task.kind, "source": task.source, "licence": task.licence}
    return {**facts, **task.facts}


def versions() -> dict[str, str]:
    """The versions of what computes."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "tokenizers", "peft", "vflair-core"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
