"""Cells put together from their pieces: the very result that a run of the experiment alone gives."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
from attrs import frozen

from vflair_core.experiments.comparison import compared
from vflair_core.experiments.config import experiment_from, structured
from vflair_core.experiments.experiment import Experiment
from vflair_core.experiments.grading.grades import Grade
from vflair_core.experiments.result import Result
from vflair_core.experiments.seams import with_readers
from vflair_core.experiments.studies.cell import Cell
from vflair_core.experiments.studies.environment import Environment, hashed
from vflair_core.experiments.studies.grid import Plan
from vflair_core.experiments.studies.pieces import Piece, arm_piece, cell_key, pieces_of
from vflair_core.experiments.studies.store import Store, opened
from vflair_core.experiments.studies.tuning import Search, target_of


@frozen
class StoredArm:
    """One arm as the store has it, with the grades of all attacks on it."""

    numbers: dict[str, Any]
    cost: dict[str, Any]
    grades: list[Grade]
    samples: list[dict[str, Any]]


@frozen
class Tuning:
    """Where the tuning of a cell stands: what is to be tried, or the experiment with the setting that was found."""

    following: Experiment | None = None
    chosen: Experiment | None = None
    facts: Mapping[str, Any] | None = None
    tried: tuple[str, ...] = ()  # arms of trials that are done
    why: str = ""  # nothing was chosen


def tuning_of(plan: Plan, environment: Environment, store: Store) -> Tuning | None:
    """How far the tuning of a cell is by what the store has; None before its undefended arm is done."""
    assert plan.knob is not None  # it is tuned
    undefended = store.found(arm_piece(plan.experiment, environment, "undefended").key)
    if undefended is None:
        return None
    target = target_of(undefended["numbers"], plan.keep)
    best, chance = (undefended["numbers"][name] for name in ("main_performance", "chance"))
    facts: dict[str, Any] = {
        "option": plan.knob.option,
        "value": None,
        "keep": plan.keep,
        "budget": plan.trials,
        "target": target,
        "undefended": best,
        "chance": chance,
        "trials": [],
    }
    if best <= chance:
        why = f"The undefended model is no better than chance ({best:.3f}, {chance:.3f}): there is no utility to keep."
        return Tuning(facts=facts, why=why)
    search, trials, tried = Search(target, plan.trials), list[dict[str, Any]](), list[str]()
    while (strength := search.following) is not None:
        value = plan.knob.value(strength)
        if value in [trial["value"] for trial in trials]:
            break  # whole numbers have none between
        e = plan.knob.apply(plan.experiment, strength)
        arm = arm_piece(e, environment, "defended")
        found = store.found(arm.key)
        if found is None:
            return Tuning(following=e, tried=tuple(tried))
        tried.append(arm.key)
        reached = found["numbers"]["main_performance"]
        trials.append({"value": value, "main_performance": reached})
        search = attrs.evolve(search, tried=(*search.tried, (strength, reached)))
    facts["trials"] = trials
    if search.best is None:
        why = f"No setting of {plan.knob.option} that was tried keeps {plan.keep:g} of the undefended utility."
        return Tuning(facts=facts, tried=tuple(tried), why=why)
    facts["value"] = plan.knob.value(search.best)
    chosen = plan.knob.apply(plan.experiment, search.best)
    return Tuning(chosen=chosen, facts=facts, tried=tuple(tried))


def open_pieces(plan: Plan, environment: Environment, store: Store) -> list[Piece]:
    """The pieces of a cell that are not done, as far as they are known: of a tuned cell, the next trial."""
    e = plan.experiment
    if plan.knob is not None:
        tuning = tuning_of(plan, environment, store)
        if tuning is None:
            e = attrs.evolve(e, defenses=(), attacks=(), adversary=None)
        elif tuning.following is not None:
            e = attrs.evolve(tuning.following, attacks=(), adversary=None)
        elif tuning.chosen is not None:
            e = tuning.chosen
        else:
            e = attrs.evolve(
                e, defenses=()
            )  # nothing keeps that much: the reference is told all the same
    pieces = pieces_of(e, environment)
    missing = [piece for piece in pieces if store.found(piece.key) is None]
    # An arm is run again where attacks are still to read what it has lost.
    lost = {piece.reads for piece in missing if piece.reads and not store.arm(piece.reads).is_dir()}
    return [piece for piece in pieces if piece in missing or piece.key in lost]


def key_of(plan: Plan, environment: Environment) -> str:
    """Hash of all that decides the numbers of a cell, and how it is tuned."""
    key = cell_key(plan.experiment, environment)
    if plan.knob is None:
        return key
    return hashed([key, attrs.asdict(plan.knob), plan.keep, plan.trials])


def assembled(key: str, plan: Plan, environment: Environment, store: Store) -> Cell:
    """A cell with its result, if all its pieces are done, or why it failed."""
    e, tuned = plan.experiment, None
    if plan.knob is not None:
        tuning = tuning_of(plan, environment, store)
        if tuning is None or tuning.facts is None:
            trial = e if tuning is None else tuning.following or e
            return Cell(key, plan.labels, e, error=_errors(trial, environment, store))
        tuned = tuning.facts
        if tuning.chosen is None:
            return Cell(key, plan.labels, e, tuned=tuned, error=tuning.why)
        e = tuning.chosen
    pieces = pieces_of(e, environment)
    if any(store.found(piece.key) is None for piece in pieces):
        return Cell(key, plan.labels, e, tuned=tuned, error=_errors(e, environment, store))
    arms = _arms(pieces, e.isolation, store)
    result = _result(e, environment, arms, pieces, store)
    grades = {name: arm.grades for name, arm in arms.items()}
    return Cell(key, plan.labels, e, result, grades, tuned)


def _errors(e: Experiment, environment: Environment, store: Store) -> str:
    failed = [(piece, store.error(piece.key)) for piece in pieces_of(e, environment)]
    return next((f"{_name(piece)}: {error}" for piece, error in failed if error), "")


def _name(piece: Piece) -> str:
    attack = f", {piece.attack.name}" if piece.attack is not None else ""
    return f"{piece.arm or 'public phase'}{attack}"


def _arms(pieces: list[Piece], isolation: str, store: Store) -> dict[str, StoredArm]:
    arms: dict[str, StoredArm] = {}
    for piece in pieces:
        found = store.found(piece.key)
        assert found is not None  # all are done
        if piece.kind == "arm":
            numbers = {**found["numbers"], "isolation": isolation}
            arms[piece.arm] = StoredArm(numbers, found["cost"], [], [])
        elif piece.kind == "grades":
            arms[piece.arm].grades.extend(Grade(**_tuples(each)) for each in found["grades"])
            arms[piece.arm].samples.extend(found["samples"])
            for name, value in found["cost"].items():  # lists have an entry for each grade
                before = arms[piece.arm].cost[name]
                arms[piece.arm].cost[name] = before + value if isinstance(value, list) else value
    for arm in arms.values():
        arm.numbers["attacks"] = [grade.numbers() for grade in arm.grades]
        arm.numbers["seams"] = with_readers(arm.numbers["seams"], arm.grades)
    return arms


def _tuples(plain: dict[str, Any]) -> dict[str, Any]:
    """A grade's fields as they were before they were JSON."""
    hits = [tuple(pair) for pair in plain["hits"]]
    return plain | {"hits": hits, "interval": tuple(plain["interval"])}


def _result(
    e: Experiment,
    environment: Environment,
    arms: Mapping[str, StoredArm],
    pieces: list[Piece],
    store: Store,
) -> Result:
    first = store.found(next(piece.key for piece in pieces if piece.kind == "arm"))
    assert first is not None  # it is done
    cost: dict[str, Any] = {name: arm.cost for name, arm in arms.items()}
    cost["seconds"] = first["seconds"]
    cost["peak_memory_bytes"] = max(store.measured(piece.key)[1] for piece in pieces)
    return Result(
        numbers=compared(arms, first["task"]["kind"], companions=first["companions"]),
        cost=cost,
        experiment=e.to_dict(),
        config_hash=e.digest,
        versions=environment["versions"],
        plugins=environment["plugins"],
        task=first["task"],
        samples=[{"arm": name, **row} for name, arm in arms.items() for row in arm.samples],
    )


# -- reading a store --------------------------------------------------------------------------------------------


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    """A plan as plain values, without its labels."""
    plain = attrs.asdict(plan)
    del plain["labels"]
    return plain


def _plan_from(labels: Mapping[str, str], plain: Mapping[str, Any]) -> Plan:
    from vflair_core.experiments.studies.tuning import Knob

    given = dict(plain)
    e, knob = experiment_from(given.pop("experiment")), given.pop("knob")
    made = None if knob is None else structured(knob, Knob, "The knob")
    return Plan(labels, e, made, **given)


def read_study(path: str | Path) -> list[Cell]:
    """The cells of a study as far as they are done, in the order of its grid.

    Raises:
        ExperimentError: There is no such study, or it is no study of this version.
    """
    with opened(path, write=False) as store:
        return [
            assembled(key, _plan_from(labels, plan), environment, store)
            for key, labels, plan, environment in store.cells()
        ]


def read_environments(path: str | Path) -> list[dict[str, Any]]:
    """What decided the numbers of each cell beside its experiment, in the order of `read_study`.

    Raises:
        ExperimentError: As for `read_study`.
    """
    with opened(path, write=False) as store:
        return [environment for *_, environment in store.cells()]
