"""What both arms of an experiment share, and the choices that hold for both."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from attrs import define, field, frozen
from torch import Tensor

from vflair_core.attacks.attack import Launch
from vflair_core.experiments.experiment import Experiment
from vflair_core.plugins import observe
from vflair_core.randomness import stream_seed
from vflair_core.tasks.collation import shuffled
from vflair_core.tasks.task import Example, Task
from vflair_core.tasks.tokenization import InputFormat, input_format_of

if TYPE_CHECKING:
    import pluggy

    from vflair_core.parties.data_party.party import DataParty


class Reporter(Protocol):
    """Shows how far a run is; the command line draws bars, a library user can pass anything."""

    def __call__(self, phase: str, done: int, total: int, /) -> None: ...


@define
class Clock:
    """Seconds per phase."""

    seconds: dict[str, float] = field(factory=dict)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


@frozen(eq=False)
class RunContext:
    """What both arms of an experiment share."""

    experiment: Experiment
    plugins: pluggy.PluginManager
    report: Reporter
    strict: bool
    out: Path | None
    task: Task
    tokenizer: Any
    processor: Any  # of pictures and text, for image-text tasks
    pretrained: dict[str, Tensor]
    launches: list[Launch]
    adversary: Launch | None  # the attack whose model party cheats
    victims: list[Example]
    prior: Tensor | None
    private_seed: int  # of attacks and candidates; nobody finds the experiment's by it
    cache: Path | None = None  # of what defenses prepare
    trained: Path | None = None  # of weights that several depths of the cut share
    keep: bool = False  # the evidence of each arm, to attack it again
    collecting: bool = False  # evidence only: attacks come later

    def take_up(self, party: DataParty) -> InputFormat:
        """Let a data party read the task; return how it does."""
        packing = self.experiment.train.packing
        return party.take_up(self.task, processor=self.processor, packing=packing)

    def reading(self, model: Any) -> InputFormat:
        """How the whole `model` reads the task."""
        packing = self.experiment.train.packing
        return input_format_of(self.task, model, processor=self.processor, packing=packing)

    def batches(self) -> Iterator[list[Example]]:
        """Yield the examples of each training step, the same for every arm; each is made when its turn comes."""
        train, seed = self.experiment.train, stream_seed(self.experiment.seed, "order")
        generator = torch.Generator().manual_seed(seed)
        numbers = shuffled(len(self.task.train), train.batch_size, generator)
        for rows in itertools.islice(numbers, train.steps):
            yield [self.task.row("train", row) for row in rows]

    @property
    def victim_length(self) -> int:
        """Tokens kept of each victim."""
        return self.experiment.victims.max_length or self.experiment.train.max_length

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Report that a phase began, and that it ended; it does not say how far it is."""
        self.report(name, 0, 1)
        yield
        self.report(name, 1, 1)

    def tell(self, hook: str, **facts: Any) -> None:
        """Tell the observers."""
        observe(self.plugins, hook, strict=self.strict, **facts)


HASHED = 4096  # rows of each split that decide the seed of the noise; of more, some spread over all


def noise_seed(seed: int, task: Task) -> int:
    """Seed of the defenses' noise: reproducible, yet out of reach for who lacks the private text.

    An attack may know the experiment and hence its seed; it must not be able to draw the same noise.
    """
    digest = hashlib.sha256()
    for split in (task.train, task.test):
        for row in _spread(len(split), HASHED):
            example = split[row]
            digest.update(example.text.encode() + b"\0")
            if example.pair is not None:
                digest.update(example.pair.encode() + b"\1")
    digest.update(f"noise {seed}".encode())
    return int(digest.hexdigest(), 16)


def _spread(count: int, most: int) -> Iterable[int]:
    return range(count) if count <= most else (row * count // most for row in range(most))
