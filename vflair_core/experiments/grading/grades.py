"""One attack's grade, its controls, and the verdict on both."""

from __future__ import annotations

from typing import Any

import attrs
from attrs import define, field, frozen

from vflair_core.attacks.knowledge import names_of, shown
from vflair_core.experiments.grading.statistics import LEVEL

ENOUGH = 5  # victims: all of them better than the floor by chance are 1 in 32


@frozen
class Reference:
    """What the same attack reached in the undefended arm, on the victims that cross again bypassed."""

    performance: float
    informative: bool


def with_verdict(grade: Grade, reference: Reference | None, bypassed: float | None) -> Grade:
    """Add the controls' verdict to a grade.

    `bypassed` is the attack's performance on messages of this run sent with the defense bypassed, on the same
    victims as `reference`; both are None in the undefended arm.
    """
    grade.positive_control = bypassed
    others = max(grade.floors.get(name, 0.0) for name in ("constant", "prior", "others"))
    undefended = grade.attack_performance if reference is None else reference.performance
    if grade.negative_control is not None and grade.negative_control > others + 0.1:
        grade.verdict = (
            f"negative control failed: {grade.negative_control:.3f} on other examples' messages"
        )
    elif bypassed is not None and bypassed < 0.95 * undefended:
        grade.verdict = (
            f"positive control failed: {bypassed:.3f} with the defense bypassed against {undefended:.3f} "
            "undefended, so the drop is not the defense's alone"
        )
    grade.informative = _is_above(grade) if reference is None else reference.informative
    if grade.verdict == "ok" and not grade.informative:
        grade.verdict = "attack uninformative: it is at the floor without a defense"
    return grade


def _is_above(grade: Grade) -> bool:
    """Whether it beats its floor: by a paired test; of fewer victims than can pass one, by its interval."""
    if len(grade.hits) >= ENOUGH:
        return grade.by_chance <= 1 - LEVEL + 1e-12
    return grade.interval[0] > grade.floor


@define
class Grade:
    """How much an attack recovered: the rate of right answers about its `target`.

    `attack_performance` (AP) is what tables show. `floor` is the best of the guesses that use no message of the
    example. `verdict` is ``"ok"`` or says which control failed or that the attack was uninformative.
    """

    attack: str
    knowledge: tuple[str, ...] = field(converter=names_of)
    target: str  # "tokens" (of prompts), "response" (tokens), "labels", "answers", "members"
    attack_performance: float
    interval: tuple[float, float]
    floor: float
    floors: dict[str, float]
    details: dict[str, float]
    positive_control: float | None = None
    negative_control: float | None = None
    verdict: str = "ok"
    budget: dict[str, float] = field(factory=dict)
    course: list[dict[str, float]] = field(factory=list)  # AP after some forwards and seconds
    reference: float = 0.0  # performance on the victims that also cross with the defense bypassed
    seconds: float = 0.0
    by_chance: float = 1.0  # probability of as large an advantage over the floor if there were none
    informative: bool = True  # above its floor where nothing defends
    adaptive: bool = False  # it takes the defense into account
    read: list[str] = field(factory=list)  # seams by which it learned something (`seams.py`)
    contract: dict[str, Any] | None = (
        None  # how it did behind a mapping that it was told of, and not
    )
    development: float | None = None  # performance on the victims that only choose among attacks
    recovered: list[str] = field(factory=list)  # the guesses as text; not among the numbers
    hits: list[tuple[int, int]] = field(factory=list)  # by victim or update; not in the numbers

    def to_dict(self) -> dict[str, Any]:
        """As plain values for a result file, without what is kept of each victim."""
        plain = attrs.asdict(self, filter=lambda a, _: a.name not in ("recovered", "hits"))
        return plain | {"knowledge": shown(self.knowledge)}

    def numbers(self) -> dict[str, Any]:
        """The same without seconds: what equal seeds reproduce."""
        plain = self.to_dict()
        del plain["seconds"]
        for point in plain["course"]:
            del point["seconds"]
        return plain
