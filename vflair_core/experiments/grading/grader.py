"""Attack what crossed: hand the evidence to the worker, and grade what it guessed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vflair_core.attacks.attack import Guess, Launch
from vflair_core.attacks.evidence import read_facts
from vflair_core.attacks.guess_files import TimedGuess, read_guess, take_so_far
from vflair_core.attacks.isolation import Isolation, attack_device
from vflair_core.attacks.scratch import scratch_folder
from vflair_core.attacks.worker import Progress, run_worker
from vflair_core.attacks.workspace import write_workspace
from vflair_core.errors import AttackError
from vflair_core.experiments.grading.adaptive_contract import judge_adaptive
from vflair_core.experiments.grading.answer_key import AnswerKey
from vflair_core.experiments.grading.grades import Grade, Reference, with_verdict
from vflair_core.experiments.grading.performance import grade, on_bypassed, performance


def attack_and_grade(
    launches: Sequence[Launch],
    store: Path,
    key: AnswerKey,
    *,
    decode: Any = None,
    references: Sequence[Reference] | None = None,
    isolation: Isolation = "process",
    progress: Progress = lambda *_: None,
    threads: int | None = None,
    device: str = "auto",
) -> list[Grade]:
    """Run the attacks on the evidence that lies in `store` and grade them.

    Args:
        launches: The attacks.
        store: Folder of `save_evidence`: what they may see, before it is cut down to what each is granted.
        key: What their guesses are held against; it stays in this process.
        decode: From token ids to text, for what was recovered.
        references: What each attack reached in the undefended arm; None for that arm itself.
        isolation: process for a worker of its own, inline for this process.
        progress: Told (attack, done, total) now and then.
        threads: CPU threads of the worker.
        device: Where the models that attacks hold compute, as `Experiment.attack_device` says it.

    Raises:
        AttackError: An attack asks for more than it is granted, or fails.
    """
    if not launches:
        return []
    for launch in launches:
        launch.check()
    facts = read_facts(store)
    keys = [key.for_updates() if "updates" in launch.asked else key for launch in launches]
    where = (threads or torch.get_num_threads(), attack_device(device))

    def once_more(store: Path, launch: Launch) -> Guess:
        with scratch_folder() as folder:
            write_workspace(folder, store, [launch], *where)
            run_worker(folder, isolation, progress)
            return read_guess(folder / "guess-0-main").guess

    with scratch_folder() as folder:
        write_workspace(folder, store, launches, *where)

        def report_progress(label: str, done: int, total: int) -> None:
            progress(label + _recovered(folder, keys), done, total)

        run_worker(folder, isolation, report_progress)
        grades: list[Grade] = []
        for number, launch in enumerate(launches):
            first = len(grades)
            for target, about in _targets(folder, number, keys[number]):
                reference = references[len(grades)] if references else None
                grade = _graded(folder, number, launch, facts, about, decode, reference)
                if target == "response":
                    grade.target, grade.recovered = target, []  # the text is shown once
                grades.append(grade)
            used = read_guess(folder / f"guess-{number}-main").used if facts["defenses"] else set()
            judge_adaptive(launch, frozenset(used), grades[first:], keys[number], store, once_more)
        return grades


def _targets(folder: Path, number: int, key: AnswerKey) -> list[tuple[str, AnswerKey]]:
    """What an attack's guess is held against: tokens of prompts, and those of responses apart if there are any."""
    guess = read_guess(folder / f"guess-{number}-main").guess
    if guess.tokens is None or not key.truth.has_responses:
        return [("", key)]
    return [("tokens", key), ("response", key.of_responses())]


def _graded(
    folder: Path,
    number: int,
    launch: Launch,
    facts: Mapping[str, Any],
    key: AnswerKey,
    decode: Any,
    reference: Reference | None,
) -> Grade:
    main = read_guess(folder / f"guess-{number}-main")
    guess = main.guess
    if guess.tokens is not None and "candidates" in (*launch.required, *launch.optional):
        raise AttackError(
            f"{launch.name} was offered candidates, among which are the victims' texts, so it may not guess tokens."
        )
    truth, reported = key.truth, key.reported
    graded = grade(
        guess.of(reported), truth.of(reported), key.prior, decode, name=launch.name, knowledge=launch.knowledge
    )  # fmt: skip
    if key.development:
        graded.development = performance(guess.of(key.apart), truth, key.apart)
    graded.seconds, graded.read = main.seconds, sorted(main.read)
    graded.course = _course(main, graded, key)
    bypassed = None
    if "bypassed" in facts["victims"]:
        bypassed = on_bypassed(read_guess(folder / f"guess-{number}-bypassed").guess, key)
    graded.reference = performance(guess.of(key.subset), truth, key.subset)
    return with_verdict(graded, reference, bypassed)


def _course(main: TimedGuess, grade: Grade, key: AnswerKey) -> list[dict[str, float]]:
    """What the guess was worth at each point of its course and in the end."""
    rows = list(key.reported)
    points = [
        (forwards, seconds, performance(Guess(tokens=tokens).of(rows), key.truth, rows))
        for forwards, seconds, tokens in main.course.points
    ]
    if points and "forwards" in grade.budget:
        points.append((grade.budget["forwards"], main.seconds, grade.attack_performance))
    names = ("forwards", "seconds", "attack_performance")
    return [dict(zip(names, point, strict=True)) for point in points]


def _recovered(folder: Path, keys: Sequence[AnswerKey]) -> str:
    """How much of the truth a guess in the making has, for who watches; the worker is not told."""
    left = take_so_far(folder)
    if left is None:
        return ""
    number, which, tokens = left
    key = keys[number]
    truth = key.truth if which == "main" or key.control is None else key.control
    if len(tokens) != len(truth.tokens):
        return ""
    return f", recovered {performance(Guess(tokens=tokens), truth, range(len(tokens))):.3f}"
