"""A run that goes on by itself: whichever party dies, and whenever, it is taken up from the last step that both have saved."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from vflair_core.errors import ChannelError, SessionLostError
from vflair_core.events import events
from vflair_core.parties.data_party.party import DataParty
from vflair_core.partition.checkpoint import steps_in
from vflair_core.tasks.collation import Batch

KEPT = 2  # checkpoints of each party: the last may be there at one of them only
TRIES = 5  # without one step more
PAUSE = 1.0  # seconds between attempts to reach the model party

Batches = Callable[[int], "Batch | Sequence[Batch]"]  # what a step learns from, by its number


class Tuning(Protocol):
    """What takes the steps: a `FineTuning`."""

    party: DataParty

    def step(self, *batches: Batch) -> float: ...

    def save(self, folder: Path, *, keep: int | None) -> Path: ...

    def load(self, folder: Path) -> int: ...


def run_lasting(
    tuning: Tuning, batches: Batches, folder: Path, *, steps: int, every: int, patience: float
) -> dict[int, float]:
    """Take all `steps` of a run, saving `every` few; return the loss of each step that was taken here, in nats.

    Raises:
        ChannelError: The model party was not reached for `patience` seconds.
        SessionLostError: The run broke off again and again at one step.
        CheckpointError: The folder holds another run, or cannot be written.
    """
    party = tuning.party
    losses: dict[int, float] = {}
    if steps_in(folder):
        _load(tuning, folder, patience)
    failed: list[int] = []  # steps
    while True:
        try:
            if not steps_in(folder):
                tuning.save(folder, keep=KEPT)  # so that there is always one to go back to
            while party.step < steps:
                step = party.step
                batch = batches(step)
                losses[step] = tuning.step(*([batch] if isinstance(batch, Mapping) else batch))
                if party.step % every == 0 or party.step == steps:
                    tuning.save(folder, keep=KEPT)
        except (ChannelError, SessionLostError) as error:
            failed.append(party.step)
            if failed.count(party.step) >= TRIES:
                raise
            events(__name__).warning("run_broke_off", step=party.step, why=str(error))
            _load(tuning, folder, patience)
        else:
            return losses


def _load(tuning: Tuning, folder: Path, patience: float) -> None:
    until = time.monotonic() + patience
    while True:
        try:
            step = tuning.load(folder)
        except ChannelError:
            if time.monotonic() > until:
                raise
            time.sleep(PAUSE)
        else:
            events(__name__).info("run_taken_up", step=step)
            return
