"""The companions of each victim: the other examples of the batch that it crosses in."""

from __future__ import annotations

from collections import Counter
from typing import Literal

import torch

from vflair_core.attacks.worker import stream_seed
from vflair_core.errors import ExperimentError
from vflair_core.experiments.experiment import Experiment
from vflair_core.tasks.task import Task

Split = Literal["train", "test"]


def companions_of(e: Experiment, task: Task) -> list[list[int]]:
    """Return the rows of the companions of each victim, in the victims' split; none if there are to be none.

    They are no victims, and go round: none is taken again before all were. In a task of classes at least one is of
    another class than the victim; of a class that is rare, some are taken earlier for that.

    Raises:
        ExperimentError: There are too few examples, or all are of the victim's class.
    """
    v = e.victims
    if not v.companions:
        return [[] for _ in range(v.count)]
    there = len(task.train if v.split == "train" else task.test)
    if v.companions > there - v.count:
        raise ExperimentError(
            f"victims.companions = {v.companions} beside victims.count = {v.count} needs {v.companions + v.count} "
            f"{v.split} examples, and task {task.name!r} has {there}. Lower one of them."
        )
    generator = torch.Generator().manual_seed(stream_seed(e.seed, "companions"))
    queue = (v.count + torch.randperm(there - v.count, generator=generator)).tolist()
    chosen = []
    for victim in range(v.count):
        rows = queue[: v.companions]
        if task.kind == "classification":
            rows = _with_another(task, v.split, victim, rows, queue)
        queue = [row for row in queue if row not in rows] + rows
        chosen.append(rows)
    return chosen


def most_often(e: Experiment, task: Task) -> int:
    """Return how many victims the example is a companion of that is one most often."""
    counts = Counter(row for rows in companions_of(e, task) for row in rows)
    return max(counts.values(), default=0)


def _with_another(
    task: Task, split: Split, victim: int, rows: list[int], queue: list[int]
) -> list[int]:
    """Return `rows`, the last one replaced by the next of the queue of another class if all are of the victim's."""
    own = task.row(split, victim).label
    other = next((row for row in queue if task.row(split, row).label != own), None)
    if other is None:
        raise ExperimentError(
            f"All {split} examples of task {task.name!r} that are no victims are of the class of victim {victim}, and "
            "companions need another. Lower victims.count, or set victims.companions = 0."
        )
    return rows if other in rows else [*rows[:-1], other]
