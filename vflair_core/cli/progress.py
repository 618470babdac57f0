"""How far a run is, on standard error: bars on a terminal; elsewhere a line for each phase, and one now and then."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

Report = Callable[[str, int, int], None]
EVERY = 30.0  # seconds


def progress(*, quiet: bool = False) -> AbstractContextManager[Report]:
    """Return what yields a reporter; a phase's number (a loss) may follow a comma. `quiet` draws no bars."""
    return bars(quiet=quiet) if sys.stderr.isatty() else lines()


@contextmanager
def bars(*, quiet: bool = False) -> Iterator[Report]:
    """Yield a reporter that draws one bar per phase."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as progress:
        tasks: dict[str, Any] = {}

        def report(phase: str, done: int, total: int) -> None:
            key = phase.split(",", 1)[0]
            if key not in tasks:
                tasks[key] = progress.add_task(phase, total=total)
            progress.update(tasks[key], description=phase, completed=done, total=total)

        yield report


@contextmanager
def lines(every: float = EVERY) -> Iterator[Report]:
    """Yield a reporter that writes a line when a phase begins, and what goes on every so many seconds.

    Also where nothing is reported for long: each line has the time since the start, the phase, and how far it is.
    """
    start, over, lock = time.monotonic(), threading.Event(), threading.Lock()
    begun: set[str] = set()
    latest = ""

    def write(text: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - start), 60)
        sys.stderr.write(f"[{minutes // 60}:{minutes % 60:02}:{seconds:02}] {text}\n")
        sys.stderr.flush()

    def report(phase: str, done: int, total: int) -> None:
        nonlocal latest
        key = phase.split(",", 1)[0]
        with lock:
            latest = f"{phase}: {done} of {total}"
            if key not in begun:
                begun.add(key)
                write(key)

    def repeat() -> None:
        while not over.wait(every):
            with lock:
                write(latest or "starting")

    watch = threading.Thread(target=repeat, name="progress", daemon=True)
    watch.start()
    try:
        yield report
    finally:
        over.set()
        watch.join()
