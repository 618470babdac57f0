"""Let the victims of an arm cross: for the attacks, some once more undefended, public queries, batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from vflair_core.attacks.attack import wants
from vflair_core.experiments.context import Setting
from vflair_core.experiments.releases import crosses_again
from vflair_core.experiments.victims import companions_of
from vflair_core.standins import public_examples
from vflair_core.tasks.task import Example
from vflair_core.victims import Crossed, record_updates, record_victims

if TYPE_CHECKING:
    from vflair_core.parties.data_party.party import DataParty


def let_cross(
    party: DataParty, setting: Setting, *, defended: bool
) -> tuple[Crossed, Crossed | None, dict[str, Crossed]]:
    """Let the victims cross, some of them once more with the defense bypassed, and public queries.

    Where several victims share an update, their batches come last, so that they change nothing of what else crosses.
    """
    v, length = setting.experiment.victims, setting.victim_length
    shares = v.share_updates and _asked(setting, "updates")
    again = crosses_again(v)
    beside = [
        [setting.task.row(v.split, row) for row in rows]
        for rows in companions_of(setting.experiment, setting.task)
    ]
    options: dict[str, Any] = {
        "max_length": length,
        "gradients": v.phase == "train",
        "updates": shares and not again,
    }
    main = record_victims(party, setting.victims, companions=beside, releases=v.releases, **options)
    bypassed = None
    if defended:
        some = crossing_again(setting)
        bypassed = record_victims(
            party, some, companions=beside[: len(some)], releases=v.releases, bypass=True, **options
        )
    queries: dict[str, Crossed] = {}
    if _asked(setting, "queries") and v.queries and setting.task.public:
        publics = public_examples(setting.task, v.queries)
        for which in ("main", "bypassed") if defended else ("main",):
            queries[which] = record_victims(
                party, publics, max_length=length, gradients=False, bypass=which == "bypassed",
                in_prompt=False,
            )  # fmt: skip
    if shares and again:
        main = _with_updates(party, main, v.update_batch, length, bypass=False)
        if bypassed is not None:
            bypassed = _with_updates(party, bypassed, v.update_batch, length, bypass=True)
    return main, bypassed, queries


def _with_updates(
    party: DataParty, crossed: Crossed, size: int, length: int, *, bypass: bool
) -> Crossed:
    updates = record_updates(party, crossed.rows, size, max_length=length, bypass=bypass)
    return attrs.evolve(crossed, updates=updates)


def crossing_again(setting: Setting) -> list[Example]:
    """The victims that cross once more with the defense bypassed: those whose labels are known do so in addition."""
    v = setting.experiment.victims
    last = min(v.known + v.bypass, v.count - v.development)
    return setting.victims[:last]


def _asked(setting: Setting, name: str) -> bool:
    """Whether an attack of this run, or perhaps one of kept evidence, asks for it."""
    return setting.keep or any(
        name in names for launch in setting.launches for names in wants(launch.attack)
    )
