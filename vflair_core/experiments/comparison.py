"""What the arms of one experiment say together: the strongest attack of each, and the scores of the defense."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from vflair_core.experiments.grading.ranking import evaluated, strongest
from vflair_core.experiments.grading.scores import Utility, scores

if TYPE_CHECKING:
    from vflair_core.experiments.grading.grades import Grade


class Findings(Protocol):
    """What is compared of an arm, whether it has just been run or is read from a store."""

    @property
    def numbers(self) -> dict[str, Any]: ...
    @property
    def grades(self) -> list[Grade]: ...


def compared(arms: Mapping[str, Findings], task_kind: str, *, companions: bool) -> dict[str, Any]:
    """The numbers of a result: those of each arm, the strongest attacks, and with a defended arm the defense's scores.

    `companions` says whether victims crossed in company.
    """
    numbers: dict[str, Any] = {
        name: {**arm.numbers, "strongest": strongest(arm.grades)} for name, arm in arms.items()
    }
    if "defended" in arms:
        plain, defended = arms["undefended"], arms["defended"]
        if defended.grades:
            main, best = (arm.numbers["main_performance"] for arm in (defended, plain))
            utility = Utility(main, best, plain.numbers["chance"])
            numbers["dcs"] = scores(plain.grades, defended.grades, utility)
        told, company = (numbers["defended"][name] for name in ("mechanism", "company"))
        numbers["defended"]["evaluated"] = evaluated(
            defended.grades,
            numbers["defended"]["covers"],
            task_kind,
            as_told=(told is None or told["matches"])
            and (companions or company is None or company["agrees"]),
        )
    return numbers
