"""How much crosses of one example: what a guarantee has to count."""

from __future__ import annotations

import attrs
from attrs import frozen

from vflair_core.experiments.experiment import Experiment, Victims
from vflair_core.experiments.victims import most_often
from vflair_core.tasks.task import Task
from vflair_core.tasks.tokenization import InputFormat
from vflair_core.training.evaluation import GREEDY


@frozen
class Releases:
    """What crosses of one example: rows of smashed data, the messages they came in, messages of its gradient."""

    rows: int = 0
    messages: int = 0
    gradients: int = 0

    def __add__(self, other: Releases) -> Releases:
        return Releases(
            self.rows + other.rows,
            self.messages + other.messages,
            self.gradients + other.gradients,
        )

    def times(self, count: int) -> Releases:
        """The same, `count` times over."""
        return Releases(self.rows * count, self.messages * count, self.gradients * count)


def releases_per_example(
    e: Experiment, task: Task, reading: InputFormat, *, evaluations: int
) -> Releases:
    """Return the most that crosses of any example: its length times its crossings.

    A passage crosses in as many windows as the longest one took; a model with two stacks has a cut layer in each; an
    evaluation that generates or tries choices crosses for each of them again.
    """
    length = max(e.train.max_length, e.victims.max_length)
    stacks = 2 if reading.two_stacks else 1
    forward = Releases(length * stacks, stacks)
    backward = attrs.evolve(forward, gradients=stacks)
    windows = reading.tally.most_rows if task.kind == "question-answering" else 1
    passes = -(-e.train.steps * e.train.batch_size // len(task.train))
    once = forward.times(windows) + _answering(task, reading, length)
    crossed = {"train": backward.times(passes * windows), "test": once.times(evaluations)}
    victim = backward if e.victims.phase == "train" else forward
    as_victim = e.victims.releases + crosses_again(e.victims)
    beside = e.victims.releases * most_often(e, task)
    crossed[e.victims.split] += victim.times(max(as_victim, beside))
    counts = crossed.values()
    return Releases(
        max(r.rows for r in counts),
        max(r.messages for r in counts),
        max(r.gradients for r in counts),
    )


def crosses_again(victims: Victims) -> bool:
    """Whether victims cross once more, in batches, to share their updates: those of the attacked batches are of others too."""
    return victims.share_updates and (victims.update_batch > 1 or victims.companions > 0)


def _answering(task: Task, reading: InputFormat, length: int) -> Releases:
    """What crosses beside the forward when one example is answered in an evaluation."""
    if task.kind not in ("causal-lm", "seq2seq", "image-text") or task.answering == "continue":
        return Releases()
    if task.answering == "choose":
        stacks = 2 if reading.two_stacks else 1
        return Releases(length * stacks, stacks).times(reading.tally.most_rows)
    options = {**GREEDY, **task.generation}
    beams = max(int(options.get("num_beams") or 1), 1)
    new = int(options.get("max_new_tokens") or 0)
    return Releases(length + new, 1 + new).times(beams)
