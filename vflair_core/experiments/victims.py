"""Who is attacked, in whose company, and what an attacker has of others."""

from __future__ import annotations

from typing import Any, Literal

import attrs
import torch
from torch import Tensor

from vflair_core.errors import ExperimentError
from vflair_core.experiments.experiment import Experiment, Victims
from vflair_core.randomness import stream_seed
from vflair_core.tasks.task import Example, Task

Split = Literal["train", "test"]
LOOKED_AT = 256  # examples, for two classes


def with_companions(e: Experiment, task: Task, model: Any) -> Experiment:
    """Return the experiment with the number of companions that it leaves out: victims cross as training does.

    As many as training has beside an example, or as there are; none at inference, and where a batch returns what some
    row scores, or pads in two ways, and a victim's own part of it would not be known.
    """
    v = e.victims
    if v.companions is not None:
        return e
    others = range(v.count, len(task.train if v.split == "train" else task.test))
    alone = v.phase != "train" or e.partition.only_scored or model.config.is_encoder_decoder
    if task.kind == "classification" and not alone:
        labels = {task.row(v.split, row).label for row in others[:LOOKED_AT]}
        alone = len(labels) < 2  # and none of another class for some victim
    count = 0 if alone else min(e.train.batch_size - 1, len(others))
    return attrs.evolve(e, victims=attrs.evolve(v, companions=count))


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
    available = len(task.train if v.split == "train" else task.test)
    if v.companions > available - v.count:
        raise ExperimentError(
            f"victims.companions = {v.companions} beside victims.count = {v.count} needs {v.companions + v.count} "
            f"{v.split} examples, and task {task.name!r} has {available}. Lower one of them."
        )
    generator = torch.Generator().manual_seed(stream_seed(e.seed, "companions"))
    queue = (v.count + torch.randperm(available - v.count, generator=generator)).tolist()
    chosen = []
    for victim in range(v.count):
        rows = queue[: v.companions]
        if task.kind == "classification":
            rows = _with_another(task, v.split, victim, rows, queue)
        queue = [row for row in queue if row not in rows] + rows
        chosen.append(rows)
    return chosen


def crosses_again(victims: Victims) -> bool:
    """Whether victims cross once more, in batches, to share their updates: those of the attacked batches are of others too."""
    return victims.share_updates and (victims.update_batch > 1 or bool(victims.companions))


def _with_another(
    task: Task, split: Split, victim: int, rows: list[int], queue: list[int]
) -> list[int]:
    """Return `rows`, the last one replaced by the next of the queue of another class if all are of the victim's."""
    label = task.row(split, victim).label
    other = next((row for row in queue if task.row(split, row).label != label), None)
    if other is None:
        raise ExperimentError(
            f"All {split} examples of task {task.name!r} that are no victims are of the class of victim {victim}, and "
            "companions need another. Lower victims.count, or set victims.companions = 0."
        )
    return rows if other in rows else [*rows[:-1], other]


def victims_of(e: Experiment, task: Task) -> list[Any]:
    """Return the victims: the first examples of their split.

    Raises:
        ExperimentError: There are fewer.
    """
    available = len(task.train if e.victims.split == "train" else task.test)
    if available < e.victims.count:
        raise ExperimentError(
            f"victims.count is {e.victims.count}, and task {task.name!r} has {available} "
            f"{e.victims.split} examples."
        )
    return [task.row(e.victims.split, n) for n in range(e.victims.count)]


def check_secrets(e: Experiment, task: Task) -> None:
    """See that some victim has something private, if any example has: attacks would be graded on nothing.

    Raises:
        ExperimentError: None has.
    """
    available = len(task.train if e.victims.split == "train" else task.test)
    first, last = min(e.victims.count, available), min(e.victims.count + LOOKED_AT, available)
    if any(_has_secrets(task.row(e.victims.split, row)) for row in range(first)):
        return
    other = (row for row in range(first, last) if _has_secrets(task.row(e.victims.split, row)))
    if (row := next(other, None)) is not None:
        raise ExperimentError(
            f"None of the victims, the first {first} {e.victims.split} examples, has anything private, so attacks would be "
            f"graded on nothing. Example {row} is the first that has: put such examples first, or set victims.count = "
            f"{row + 1} or more."
        )


def _has_secrets(example: Example) -> bool:
    spans = [example.private] + ([] if example.pair is None else [example.private_pair])
    return any(given is None or given for given in spans)


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
    available = len(getattr(task, other))
    if available < half:
        raise ExperimentError(
            f"victims.candidates = {victims.candidates} needs {half} {other} examples, and task {task.name!r} "
            f"has {available}."
        )
    inside = [task.row(victims.split, n).text for n in range(half)]  # type: ignore[arg-type]
    outside = [task.row(other, available - 1 - n).text for n in range(half)]  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(stream_seed(seed, "candidates"))
    order = torch.randperm(2 * half, generator=generator).tolist()
    texts = inside + outside
    return [texts[n] for n in order], torch.tensor([n if n < half else -1 for n in order])


def _plain(example: Example) -> dict[str, Any]:
    """What a file of JSON can hold of an example: all but its pictures."""
    return attrs.asdict(attrs.evolve(example, images=()))
