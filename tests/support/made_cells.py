"""Cells of a study made by hand: what each attack got right of each victim decides all the numbers they have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs

from support.small_models import LLAMA
from vflair_core.communication.transcript import Transcript
from vflair_core.experiments.arm import Arm
from vflair_core.experiments.comparison import compared
from vflair_core.experiments.config import experiment_from
from vflair_core.experiments.grading.grades import Grade
from vflair_core.experiments.grading.statistics import interval, pooled
from vflair_core.experiments.result import Result
from vflair_core.experiments.studies.cell import Cell

Hits = Sequence[tuple[int, int]]
NOISE = {"name": "gaussian-noise", "options": {"noise_multiplier": 0.3}}
WEAK, STRONG = [(1, 10), (2, 10), (1, 10), (2, 10)], [(8, 10), (9, 10), (7, 10), (10, 10)]


def grade(
    hits: Hits,
    attack: str = "vocabulary-search",
    knowledge: Sequence[str] = ("K4",),
    *,
    floor: float = 0.05,
    verdict: str = "ok",
    positive: float | None = None,
    negative: float | None = 0.02,
    adaptive: bool = False,
    target: str = "tokens",
    unanswered: float = 0.0,
) -> Grade:
    """The grade of an attack that got `hits` right."""
    details = {"unanswered": unanswered} if unanswered else {}
    return Grade(
        attack, tuple(knowledge), target, pooled(hits), interval(hits), floor, {"constant": floor}, details,
        positive_control=positive, negative_control=negative, verdict=verdict, adaptive=adaptive, hits=list(hits),
    )  # fmt: skip


def defended(hits: Hits, **other: Any) -> Grade:
    """The same in a defended arm: with a positive control, and knowing the defense."""
    return grade(hits, **{"positive": 1.0, "adaptive": True, **other})


def cell(
    *,
    before: Sequence[Grade] | None = None,
    after: Sequence[Grade] | None = None,
    best: float = 0.8,
    main: float = 0.6,
    chance: float = 0.2,
    seed: int = 0,
    head: int = 1,
    tail: int = 1,
    defenses: Sequence[Any] = (NOISE,),
    seams: Sequence[Any] | None = None,
    labels: dict[str, str] | None = None,
    cost: dict[str, Any] | None = None,
    **changes: Any,
) -> Cell:
    """A finished cell; with no defenses it has the undefended arm only."""
    before = [grade(STRONG)] if before is None else before
    after = [defended(WEAK)] if after is None else after
    arms = {"undefended": _arm(before, best, chance, seams)}
    if defenses:
        arms["defended"] = _arm(after, main, chance, seams)
    experiment = experiment_of(
        seed=seed, head=head, tail=tail, defenses=defenses, attacks=before, **changes
    )
    result = Result(
        numbers=compared(arms, "causal-lm", companions=False),
        cost={name: cost or {"total_bytes": 2_000_000, "seconds": {"fine-tuning": 3.0, "attacks": 9.0}} for name in arms},
        experiment=experiment.to_dict(),
        config_hash=experiment.digest,
        versions={"python": "3.11.7", "vflair-core": "0.1.0"},
        samples=[{"arm": "undefended", "attack": "a", "private": "the private sentence", "recovered": "the recovered one"}],
    )  # fmt: skip
    return Cell(
        key=experiment.digest,
        labels=labels or {},
        experiment=experiment,
        result=result,
        grades={name: tuple(arm.grades) for name, arm in arms.items()},
    )


def experiment_of(
    *, seed: int, head: int, tail: int, defenses: Sequence[Any], attacks: Sequence[Grade], **changes: Any
) -> Any:  # fmt: skip
    table = {
        "task": {"name": "words"},
        "model": {"config": LLAMA, "vocab_size": 300},
        "partition": {"head": head, "tail": tail},
        "train": {"steps": 6, "batch_size": 4, "max_length": 16},
        "seed": seed,
        "defenses": list(defenses),
        "attacks": [{"name": g.attack, "knowledge": list(g.knowledge)} for g in attacks],
        **changes,
    }
    return experiment_from(table)


def _arm(grades: Sequence[Grade], main: float, chance: float, seams: Sequence[Any] | None) -> Arm:
    numbers = {
        "main_performance": main,
        "metric": "token_accuracy",
        "chance": chance,
        "attacks": [each.numbers() for each in grades],
        "mechanism": None,
        "company": None,
        "covers": ["prompt"],
        "guarantees": [],
    }
    if seams is not None:
        numbers["seams"] = list(seams)
    return Arm(numbers, {}, Transcript(), list(grades), [], [], None)


def failed(error: str, **changes: Any) -> Cell:
    """A cell that failed."""
    return attrs.evolve(cell(**changes), result=None, grades={}, error=error)


def not_run(**changes: Any) -> Cell:
    """A cell that waits."""
    return attrs.evolve(cell(**changes), result=None, grades={})


def study() -> list[Cell]:
    """Two seeds, two cuts, three defenses, of which one fails its control, one failed cell and one that waits."""
    other = {"name": "top-k", "options": {"k": 8}}
    broken = {"name": "permutation"}
    cells = []
    for seed in (0, 1):
        for head in (1, 2):
            shared = {
                "seed": seed,
                "head": head,
                "before": [grade(STRONG), grade(WEAK, "nearest-embedding", ["K1"])],
            }
            low = defended([(head, 10)] * 4)
            high = defended([(6 + seed, 10)] * 4)
            near = defended(WEAK, attack="nearest-embedding", knowledge=["K1"], adaptive=False)
            wrong = defended(
                [(0, 10)] * 4,
                verdict="positive control failed: 0.100 with the defense bypassed against 0.850 undefended",
            )
            cells += [
                cell(**shared, after=[low, near], main=0.5 + 0.1 * seed),
                cell(**shared, after=[high, near], main=0.75, defenses=[other]),
                cell(**shared, after=[wrong, near], main=0.7, defenses=[broken]),
            ]
    cells.append(failed("DefenseError: it <b>broke</b> & stopped", seed=2))
    cells.append(not_run(seed=3))
    return cells
