"""How many rows of smashed data cross of one example: what a guarantee has to count."""

from __future__ import annotations

from vflair_core.evaluation import GREEDY
from vflair_core.experiment import Experiment
from vflair_core.reading import Reading
from vflair_core.task import Task


def releases_per_example(e: Experiment, task: Task, reading: Reading, *, evaluations: int) -> int:
    """Return the rows of the example that crosses most often: its length times its crossings.

    A passage crosses in as many windows as the longest one took; a model with two stacks has a cut layer in each; an
    evaluation that generates or tries choices crosses for each of them again.
    """
    length = max(e.train.max_length, e.victims.max_length)
    once = length * (2 if reading.two_stacks else 1)
    windows = reading.tally.most_rows if task.kind == "question-answering" else 1
    passes = -(-e.train.steps * e.train.batch_size // len(task.train))
    rows = {
        "train": passes * windows * once,
        "test": evaluations * (windows * once + _answering(task, reading, length)),
    }
    rows[e.victims.split] += e.victims.releases * once
    return max(rows.values())


def _answering(task: Task, reading: Reading, length: int) -> int:
    """Rows that cross beside the forward when one example is answered in an evaluation."""
    if task.kind not in ("causal-lm", "seq2seq", "image-text") or task.answering == "continue":
        return 0
    if task.answering == "choose":
        return reading.tally.most_rows * length * (2 if reading.two_stacks else 1)
    options = {**GREEDY, **task.generation}
    beams = max(int(options.get("num_beams") or 1), 1)
    return beams * (length + int(options.get("max_new_tokens") or 0))
