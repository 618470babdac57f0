"""What a study still has to do, and about how long that takes by what ran before. Nothing is run."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from vflair_core.experiments.experiment import Experiment
from vflair_core.experiments.studies.assembly import assembled, key_of, open_pieces, tuning_of
from vflair_core.experiments.studies.grid import Plan
from vflair_core.experiments.studies.pieces import Piece, pieces_of
from vflair_core.experiments.studies.store import Store, opened
from vflair_core.experiments.studies.study import environments_of, planned


@frozen
class Ahead:
    """One cell before it is run.

    Attributes:
        key: Hash of all that decides its numbers.
        labels: What it is on each axis.
        state: done, failed, begun or new.
        pieces: How many pieces of work are left, of a tuned cell at most; those that cells share count in each.
        error: Why it failed.
    """

    key: str
    labels: Mapping[str, str]
    state: str
    pieces: int
    error: str = ""


@frozen
class Outlook:
    """What is left of a study: each cell, and the pieces of all of them, each counted once.

    Attributes:
        cells: The cells in their order.
        left: Pieces that are left by kind: public, arm, grades.
        seconds: About how long these take one after the other; of those of which something alike ran before.
        unknown: Pieces of which nothing alike ran before.
    """

    cells: list[Ahead]
    left: dict[str, int]
    seconds: float
    unknown: int


def outlook(
    cells: Sequence[Experiment] | Sequence[Plan],
    db: str | Path,
    *,
    plugins: Iterable[str | Path] = (),
) -> Outlook:
    """Say what `study` would run of these cells.

    Raises:
        ExperimentError: There is no cell, something in one does not exist, or `db` is no study.
    """
    plans = planned(cells)
    environments = environments_of(plans, plugins)
    if not Path(db).exists():
        with (
            tempfile.TemporaryDirectory() as empty,
            opened(Path(empty) / "new.db", write=True) as store,
        ):
            return _outlook(plans, environments, store)
    with opened(db, write=False) as store:
        return _outlook(plans, environments, store)


def _outlook(plans: Sequence[Plan], environments: Sequence[Any], store: Store) -> Outlook:
    ahead, left, trials = list[Ahead](), dict[str, Piece](), dict[str, int]()
    for plan, environment in zip(plans, environments, strict=True):
        key = key_of(plan, environment)
        pieces, more = _left(plan, environment, store)
        left |= {piece.key: piece for piece in pieces}
        trials[key] = more
        cell = assembled(key, plan, environment, store)
        begun = len(pieces) < len(pieces_of(plan.experiment, environment))
        finished = cell.result is not None or cell.without_setting
        state = "done" if finished else "failed" if cell.failed else "begun" if begun else "new"
        ahead.append(Ahead(key, plan.labels, state, len(pieces) + more, cell.error))
    return _estimated(ahead, list(left.values()), trials, store)


def _left(plan: Plan, environment: Any, store: Store) -> tuple[list[Piece], int]:
    """The pieces that are left as they are known now, and how many trials may come beside them."""
    if plan.knob is None:
        return open_pieces(plan, environment, store), 0
    tuning = tuning_of(plan, environment, store)
    if tuning is not None and tuning.facts is not None:
        return open_pieces(plan, environment, store), 0
    tried = 0 if tuning is None else len(tuning.tried)
    weakest = plan.knob.apply(plan.experiment, 0.0)  # stands for the setting that will be chosen
    pieces = pieces_of(weakest, environment)
    return [p for p in pieces if store.found(p.key) is None], plan.trials - max(tried, 1)


def _estimated(
    ahead: list[Ahead], left: list[Piece], trials: Mapping[str, int], store: Store
) -> Outlook:
    known = _means(store)
    counts: dict[str, int] = defaultdict(int)
    seconds, unknown = 0.0, 0
    arms = [piece for piece in left if piece.arm == "defended" and piece.kind == "arm"]
    more = [(arms[0] if arms else None, sum(trials.values()))]
    for piece, count in [*((piece, 1) for piece in left), *more]:
        if piece is None or not count:
            continue
        counts[piece.kind] += count
        mean = next((known[n] for n in _names(piece.kind, piece.about) if n in known), None)
        if mean is None:
            unknown += count
        else:
            seconds += count * mean
    return Outlook(ahead, dict(counts), seconds, unknown)


def _means(store: Store) -> dict[tuple[Any, ...], float]:
    """Mean seconds of what ran before, under names from the most alike to the least."""
    measured: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for kind, about, seconds in store.seconds():
        for name in _names(kind, about):
            measured[name].append(seconds)
    return {name: sum(each) / len(each) for name, each in measured.items()}


def _names(kind: str, about: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    place = (kind, about["task"], about["model"])
    if kind == "grades":
        attack = about["attack"]["name"]
        return [(*place, attack, about["arm"]), (*place, attack)]
    defenses = tuple(spec["name"] for spec in about.get("defenses", ()))
    return [(*place, about["arm"], defenses), (*place, about["arm"].removeprefix("active-")), place]
