"""Runs attacks in a process of their own, which :mod:`~vflair_core.attacks.fence` starts.

The folder holds the transcript and the granted knowledge: no truth, no noise seed and no private text, and
neither does this process. It is no sandbox: an attack that breaks out of its process attacks the machine, not
the messages. Guesses are written back into the folder.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from vflair_core.attacks.attack import launch
from vflair_core.attacks.grants import GrantedKnowledge
from vflair_core.attacks.guess_files import Progression, TimedGuess, leave_so_far, write_guess
from vflair_core.attacks.isolation import Isolation, failure_in, hint_of, reporting, started
from vflair_core.attacks.workspace import Workspace
from vflair_core.errors import AttackError
from vflair_core.events import events
from vflair_core.offers import load_target

log = events(__name__)

MARK = b"@vflair "
WORKER = "vflair_core.attacks.worker"
Progress = Callable[[str, int, int], None]


def run_job(folder: Path, progress: Progress) -> None:
    """Run every attack of the job on every pass it is asked for, and write the guesses."""
    workspace = Workspace(folder)
    for attack in workspace.job["attacks"]:
        callable_ = load_target(attack["target"])
        callable_ = callable_(**attack["options"]) if isinstance(callable_, type) else callable_
        for which in attack["passes"]:
            label = f"{attack['name']} ({which})"
            start, course = time.perf_counter(), Progression()

            def report(
                done: int,
                total: int,
                objective: float | None = None,
                tokens: Tensor | None = None,
                forwards: float | None = None,
                *,
                label: str = label,
                place: str = f"{attack['number']} {which}",
                start: float = start,
                course: Progression = course,
            ) -> None:
                shown = label if objective is None else f"{label}, objective {objective:.4g}"
                if tokens is not None:  # who knows the truth says how much of it that is
                    tokens = tokens.cpu()
                    leave_so_far(folder, tokens, place)
                    if forwards is not None:
                        course.add(forwards, time.perf_counter() - start, tokens)
                progress(shown, done, total)

            torch.manual_seed(attack["seed"])
            knowledge = GrantedKnowledge(workspace, attack, which, report)
            guess = launch(callable_, knowledge)
            seconds = time.perf_counter() - start
            looked = frozenset(knowledge.used), frozenset(knowledge.read)
            timed = TimedGuess(guess, seconds, course, *looked)
            write_guess(folder / f"guess-{attack['number']}-{which}", timed)


def run_worker(folder: Path, isolation: Isolation, progress: Progress) -> None:
    """Run the job in `folder`: in a process of its own, or inline in this one.

    Raises:
        AttackError: An attack failed.
    """
    if isolation == "inline":
        run_job(folder, progress)
        return
    with started(WORKER, folder) as process:
        assert process.stdout is not None  # a pipe was asked for
        for line in process.stdout:
            if line.startswith(MARK):
                progress(*json.loads(line.removeprefix(MARK)))
    if not process.returncode:
        return
    failure = failure_in(folder, process.returncode)
    if failure.traceback is None:
        raise AttackError(f"The attack worker failed: {failure.error}")
    log.error("attack_failed", traceback=failure.traceback)
    device = json.loads((folder / "job.json").read_text())["device"]
    raise AttackError(f"An attack failed: {failure.error}{hint_of(device, failure.error)}")


def main(folder: Path) -> int:
    """Entry point of the process; tells its parent how far it is by lines on standard output."""

    def tell(label: str, done: int, total: int) -> None:
        sys.stdout.write(f"{MARK.decode()}{json.dumps([label, done, total])}\n")
        sys.stdout.flush()

    return reporting(folder, lambda: run_job(folder, tell))
