"""Let the victims of an arm cross: once for the attacks, some once more undefended, and public queries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vflair_core.attack import wants
from vflair_core.channel import Transcript
from vflair_core.setting import Setting
from vflair_core.standins import public_examples
from vflair_core.task import Example
from vflair_core.victims import Crossed, record_victims

if TYPE_CHECKING:
    from vflair_core.data_party import DataParty


def let_cross(
    party: DataParty, setting: Setting, *, defended: bool
) -> tuple[Crossed, Crossed | None, dict[str, Transcript]]:
    """Let the victims cross, some of them once more with the defense bypassed, and public queries."""
    v, length = setting.experiment.victims, setting.victim_length
    gradients = v.phase == "train"
    options: dict[str, Any] = {
        "max_length": length,
        "gradients": gradients,
        "updates": v.share_updates and _asked(setting, "updates"),
    }
    main = record_victims(party, setting.victims, releases=v.releases, **options)
    bypassed = None
    if defended:
        some = crossing_again(setting)
        bypassed = record_victims(party, some, releases=v.releases, bypass=True, **options)
    queries: dict[str, Transcript] = {}
    if _asked(setting, "queries") and v.queries and setting.task.public:
        publics = public_examples(setting.task, v.queries)
        for which in ("main", "bypassed") if defended else ("main",):
            queries[which] = record_victims(
                party, publics, max_length=length, gradients=False, bypass=which == "bypassed",
                in_prompt=False,
            ).transcript  # fmt: skip
    return main, bypassed, queries


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
