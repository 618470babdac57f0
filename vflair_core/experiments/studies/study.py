"""Run a study: what is not done yet of its cells, in waves of pieces that need nothing of each other.

    for cell in study(read_grid("grid.toml"), "runs/study.db", workers=2): print(cell.labels, cell.result.numbers["dcs"])

Every finished piece is written at once, so whatever ends this process loses what was running and no more.
"""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import attrs
from attrs import define, field

from vflair_core.errors import ExperimentError, VflairError
from vflair_core.events import events
from vflair_core.experiments.build import make_defenses, make_launches
from vflair_core.experiments.context import Reporter
from vflair_core.experiments.experiment import Experiment
from vflair_core.experiments.studies.assembly import (
    assembled,
    key_of,
    open_pieces,
    plan_to_dict,
    tuning_of,
)
from vflair_core.experiments.studies.backends import Backend, Parallel, parallel_on
from vflair_core.experiments.studies.cell import Cell
from vflair_core.experiments.studies.environment import environment_of
from vflair_core.experiments.studies.grid import Plan, labelled
from vflair_core.experiments.studies.pieces import Piece, pieces_of, without_threads
from vflair_core.experiments.studies.replay import replay
from vflair_core.experiments.studies.store import Outcome, Store, drop_blobs, opened
from vflair_core.plugins import plugin_manager

log = events(__name__)


def study(
    cells: Sequence[Experiment] | Sequence[Plan],
    db: str | Path,
    *,
    workers: int = 1,
    backend: Backend = "loky",
    plugins: Iterable[str | Path] = (),
    retry: bool = False,
    take_in: Iterable[str | Path] = (),
    report: Reporter = lambda *_: None,
) -> list[Cell]:
    """Run experiments as one study, and return each with what it found; what the store has is not run again.

    Cells share their public phase, their undefended arm and whatever else is the same. One that fails keeps its error,
    and the others go on. Observers are told of each cell that is new as of a run, at the end. Ctrl-C lets the pieces that are running end; a second one does not.

    Args:
        cells: Experiments, or the plans that `read_grid` reads.
        db: The store, a SQLite file that is made if it is not there; what attacks read lies beside it.
        workers: Processes that work at a time.
        backend: loky on this machine, sequential in this process, ray or dask on a cluster whose machines see the store's folder.
        plugins: Files of one-file plugins.
        retry: Run again what failed before.
        take_in: Other stores, as of other machines, whose finished pieces count as done.
        report: Told (phase, done, total) of pieces.

    Raises:
        ExperimentError: There is no cell, something in one does not exist, the store cannot be written to, or joblib is missing.
        KeyboardInterrupt: Ctrl-C was pressed; what was finished is in the store.
    """
    files = [str(Path(file).resolve()) for file in plugins]
    plans = planned(cells)
    environments, parallel = environments_of(plans, files), parallel_on(backend, workers)
    with opened(db, write=True) as store:
        if retry:
            store.forget_failures()
        for other in take_in:
            store.take_in(Path(other))
        keys = [key_of(p, e) for p, e in zip(plans, environments, strict=True)]
        rows = list(zip(keys, plans, environments, strict=True))
        store.set_cells((k, dict(p.labels), plan_to_dict(p), e) for k, p, e in rows)
        before = [assembled(key, plan, environment, store) for key, plan, environment in rows]
        shared = _shared_training(plans, environments)
        _run_all(_Run(plans, environments, store, files, report, shared=shared), parallel)
        found = [assembled(key, plan, environment, store) for key, plan, environment in rows]
    observers = plugin_manager(files)
    for cell, earlier in zip(found, before, strict=True):
        if earlier.result is None:
            replay(cell, observers)
    return found


def planned(cells: Sequence[Experiment] | Sequence[Plan]) -> list[Plan]:
    """The plans of what a study is given, each with a number of threads.

    Raises:
        ExperimentError: There is none.
    """
    given = list(cells)
    if not given:
        raise ExperimentError("A study needs at least one cell.")
    if len({type(each) for each in given}) > 1 or not isinstance(given[0], (Experiment, Plan)):
        kinds = sorted({type(each).__name__ for each in given})
        raise ExperimentError(
            f"A study is of experiments or of plans (`read_grid`), not of {' and '.join(kinds)}."
        )
    experiments = [each for each in given if isinstance(each, Experiment)]
    plans = (
        labelled(experiments) if experiments else [each for each in given if isinstance(each, Plan)]
    )
    return [attrs.evolve(plan, experiment=without_threads(plan.experiment)) for plan in plans]


def environments_of(plans: Sequence[Plan], plugins: Iterable[str | Path]) -> list[dict[str, Any]]:
    """What decides the numbers of each cell beside its experiment, when every part of it has been seen to exist.

    Raises:
        ExperimentError: Something in a cell does not exist, or an option of it does not fit; the error names the cell.
    """
    manager, each = plugin_manager(plugins), list[dict[str, Any]]()
    for plan in plans:
        e, knob = plan.experiment, plan.knob
        try:
            for one in [e] if knob is None else [knob.apply(e, end) for end in (0.0, 1.0)]:
                make_defenses(one, manager)
            make_launches(e.attacks, manager, 0)
            each.append(environment_of(e, manager))
        except VflairError as error:
            raise ExperimentError(f"{plan.name}: {error} Nothing was run.") from error
    return each


@define
class _Run:
    """A study while it runs."""

    plans: Sequence[Plan]
    environments: Sequence[dict[str, Any]]
    store: Store
    plugins: Sequence[str]
    report: Reporter
    stopping: bool = False
    finished: int = 0
    shared: Mapping[str, frozenset[str]] = field(factory=dict)  # arms by a training that they share
    suspects: dict[str, Piece] = field(factory=dict)  # at work when a process died
    mended: set[str] = field(factory=set)  # arms of which files were missing

    def wave(self) -> list[Piece]:
        """The pieces that are not done, did not fail, and need nothing that is missing, each once.

        Of arms that share a training which nobody has done yet, the first; the others take over what it leaves.
        """
        ready: dict[str, Piece] = {}
        for plan, environment in zip(self.plans, self.environments, strict=True):
            for piece in open_pieces(plan, environment, self.store):
                able = all(self.store.found(key) is not None for key in piece.needs)
                there = not piece.reads or self.store.arm(piece.reads).is_dir()
                if able and there and not self.store.error(piece.key):
                    ready[piece.key] = piece
        training = {
            piece.trained: piece.key
            for piece in reversed(ready.values())
            if piece.trained in self.shared
            and not any(self.store.found(arm) for arm in self.shared[piece.trained])
        }
        return [
            piece for piece in ready.values() if training.get(piece.trained, piece.key) == piece.key
        ]

    def task(self, piece: Piece) -> tuple[Any, ...]:
        """What `do` is called with."""
        reference = self.store.found(piece.reference) if piece.reference else None
        grades = reference["grades"] if reference is not None else []
        if piece.trained not in self.shared:
            piece = attrs.evolve(piece, trained="")
        return (piece, self.store.folder, self.plugins, grades)

    def write(self, piece: Piece, outcome: Outcome, total: int) -> None:
        """Keep what came of a piece, and tell of it."""
        if outcome.lost and piece.reads not in self.mended:
            self.mended.add(piece.reads)  # once: its arm is run again
            shutil.rmtree(self.store.arm(piece.reads), ignore_errors=True)
            self.suspects.pop(piece.key, None)
            return
        self.store.write(piece.key, piece.kind, piece.about, outcome)
        self.finished += 1
        self.suspects.pop(piece.key, None)
        if outcome.error:
            log.warning("piece_failed", key=piece.key, kind=piece.kind, error=outcome.error)
        self.report("pieces", self.finished, total)


def _shared_training(
    plans: Sequence[Plan], environments: Sequence[dict[str, Any]]
) -> dict[str, frozenset[str]]:
    """Undefended trainings that are the same at several depths of the cut, each with its arms."""
    arms: dict[str, set[str]] = {}
    for plan, environment in zip(plans, environments, strict=True):
        for piece in pieces_of(plan.experiment, environment):
            if piece.trained:
                arms.setdefault(piece.trained, set()).add(piece.key)
    return {key: frozenset(each) for key, each in arms.items() if len(each) > 1}


def _run_all(run: _Run, parallel: Parallel) -> None:
    """Run wave after wave until nothing is left that can be run."""
    with _draining(run):
        while not run.stopping and (wave := run.wave()):
            total = run.finished + len(wave)
            # One of several ended its process: alone, it is known which.
            suspects = [piece for piece in wave if piece.key in run.suspects][:1]
            _run_wave(run, suspects or wave, parallel, total)
            _drop_trials(run)
            _drop_trained(run)
        _drop_trained(run)
    if run.stopping:
        stop = KeyboardInterrupt()
        stop.add_note(
            f"What was finished is in {run.store.path}; the same command goes on with the rest."
        )
        raise stop


def _run_wave(run: _Run, wave: Sequence[Piece], parallel: Parallel, total: int) -> None:
    from joblib.externals.loky.process_executor import BrokenProcessPool

    given = [(piece, run.task(piece)) for piece in wave]

    def tasks() -> Iterator[Any]:  # joblib asks for them in threads of its own
        for piece, task in given:
            if run.stopping:
                return
            run.suspects[piece.key] = piece
            yield piece.key, task

    pieces = {piece.key: piece for piece in wave}
    try:
        for key, outcome in parallel(tasks()):
            run.write(pieces[key], outcome, total)
    except BrokenProcessPool as error:  # a process died, or was to start when all were stopped
        if len(wave) == 1 and not run.stopping:
            told = f"Its process was ended from outside, as where memory runs out: {error}"
            run.write(wave[0], Outcome(error=" ".join(told.split())), total)


def _drop_trials(run: _Run) -> None:
    """Remove what attacks would read of settings that a finished tuning did not choose, and that no cell is."""
    tried, wanted = set[str](), set[str]()
    for plan, environment in zip(run.plans, run.environments, strict=True):
        final, tuning = plan.experiment, None
        if plan.knob is not None:
            tuning = tuning_of(plan, environment, run.store)
        if tuning is not None and tuning.facts is None:  # one of these may be chosen yet
            wanted |= set(tuning.tried)
        elif tuning is not None:
            tried |= set(tuning.tried)
            final = tuning.chosen or final
        wanted |= {piece.key for piece in pieces_of(final, environment)}
    for key in tried - wanted:
        shutil.rmtree(run.store.arm(key), ignore_errors=True)
    drop_blobs(run.store.folder)


def _drop_trained(run: _Run) -> None:
    """Remove weights that no arm is left to take over."""
    open_arms = {
        key
        for key, arms in run.shared.items()
        if any(run.store.found(arm) is None and not run.store.error(arm) for arm in arms)
    }
    for folder in run.store.trained("").glob("*"):
        if folder.name not in open_arms:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _draining(run: _Run) -> Iterator[None]:
    """While this lasts, a first Ctrl-C begins nothing more; what is running ends, unless there is a second."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def drain(_number: int, _frame: FrameType | None) -> None:
        run.stopping = True
        signal.signal(signal.SIGINT, before)
        run.report(
            "stopping: waiting for what is running; Ctrl-C again leaves it",
            run.finished,
            run.finished,
        )

    signal.signal(signal.SIGINT, drain)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
