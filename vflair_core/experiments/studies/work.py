"""What a process does that works on a study: one piece, from beginning to end, told back as plain values."""

from __future__ import annotations

import copy
import os
import resource
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch

from vflair_core.attacks.evidence import read_facts
from vflair_core.errors import VflairError
from vflair_core.experiments.arm import run_arm
from vflair_core.experiments.attack_phase import attack_store, references_of
from vflair_core.experiments.base_model import prepare_model
from vflair_core.experiments.build import build_run, make_defenses, make_launches
from vflair_core.experiments.context import Clock
from vflair_core.experiments.costs import cost_of_attacks
from vflair_core.experiments.experiment import Experiment
from vflair_core.experiments.grading.answer_key import AnswerKey
from vflair_core.experiments.grading.grades import Grade
from vflair_core.experiments.output import KEY
from vflair_core.experiments.promises import samples_of
from vflair_core.experiments.result import facts_of
from vflair_core.experiments.run import compare_unsplit
from vflair_core.experiments.studies.pieces import Piece
from vflair_core.experiments.studies.store import PART, Outcome, is_whole, list_files, share_files
from vflair_core.offers import build, find
from vflair_core.plugins import plugin_manager


class _LostError(Exception):
    """Some of what an attack reads is not there any more."""


def do(
    piece: Piece, folder: Path, plugins: Sequence[str], reference: Sequence[Mapping[str, Any]]
) -> Outcome:
    """Do a piece and say what came of it; an error is an outcome too.

    Args:
        piece: What to do.
        folder: Of the store: where arms keep what attacks read, and what is prepared on public text lies.
        plugins: Files of one-file plugins.
        reference: Of grades of a defended arm: those of the undefended one.
    """
    start = time.perf_counter()
    if threading.current_thread() is threading.main_thread() and _is_worker():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who gave the work
    threads = torch.get_num_threads()
    try:
        with torch.random.fork_rng():
            torch.set_num_threads(piece.experiment.threads or threads)
            found = _DOES[piece.kind](piece, folder, plugins, reference)
        outcome = Outcome(found)
    except _LostError:
        outcome = Outcome(lost=True, error="Files that attacks read are missing.")
    except Exception as error:  # noqa: BLE001 - whatever a plugin raises is an outcome, and told with its trace
        name = "" if isinstance(error, VflairError) else f"{type(error).__name__}: "
        outcome = Outcome(error=f"{name}{error}", trace=traceback.format_exc())
    finally:
        torch.set_num_threads(threads)
    peak = max(
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return attrs.evolve(outcome, seconds=time.perf_counter() - start, peak_memory_bytes=peak * 1024)


def _is_worker() -> bool:
    import multiprocessing

    return multiprocessing.parent_process() is not None


def _public(piece: Piece, folder: Path, plugins: Sequence[str], _: Any) -> dict[str, Any]:
    e = piece.experiment
    task = build(find(plugin_manager(plugins), "tasks", e.task.name), e.task.options)
    prepare_model(e, task, lambda *_: None, folder / "public")
    return {}


def _arm(piece: Piece, folder: Path, plugins: Sequence[str], _: Any) -> dict[str, Any]:
    place = folder / "arms" / piece.key
    part = place.with_name(
        f"{place.name}.{os.getpid()}{PART}"
    )  # one that was killed may still be at work
    part.mkdir(parents=True, mode=0o700)
    try:
        trained = folder / "trained" / piece.trained if piece.trained else None
        found = _run_arm(piece.experiment, piece.arm, part, plugins, folder / "public", trained)
        share_files(part, folder / "blobs")
        list_files(part)
        shutil.rmtree(place, ignore_errors=True)
        part.rename(place)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return found


def _run_arm(
    e: Experiment, name: str, out: Path, plugins: Sequence[str], cache: Path, trained: Path | None
) -> dict[str, Any]:
    clock = Clock()
    setting, model = build_run(
        e,
        plugin_manager(plugins),
        out=out,
        collecting=True,
        cache=cache,
        trained=trained,
        clock=clock,
    )
    whole = copy.deepcopy(model) if e.check_unsplit and name == "undefended" else None
    defenses = make_defenses(e, setting.plugins)
    arm = run_arm(name, model, defenses, setting, [], active=name.startswith("active"))
    if whole is not None:
        with clock("unsplit reference"):
            compare_unsplit(whole, setting, arm)
    return {
        "numbers": arm.numbers,
        "cost": arm.cost,
        "seconds": dict(clock.seconds),
        "task": facts_of(setting.task),
        "companions": bool(setting.experiment.victims.companions),
    }


def _grades(
    piece: Piece, folder: Path, plugins: Sequence[str], reference: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    e, store = piece.experiment, folder / "arms" / piece.reads / f"evidence-{piece.arm}"
    assert piece.attack is not None  # it is of grades
    if not is_whole(store.parent):
        raise _LostError
    seed = read_facts(store)["seed"]
    launches = make_launches([piece.attack], plugin_manager(plugins), seed)
    references = references_of([Grade(**each) for each in reference]) if piece.reference else None
    grades = attack_store(
        store,
        launches,
        references,
        isolation=e.isolation,
        threads=e.threads or None,
        device=e.attack_device,
    )
    truth = AnswerKey.load(store / KEY).truth
    return {
        "grades": [attrs.asdict(grade) for grade in grades],
        "samples": samples_of(grades, truth),
        "cost": cost_of_attacks(e, grades),
    }


_DOES = {"public": _public, "arm": _arm, "grades": _grades}
