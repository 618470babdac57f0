"""The ranking: of each setting at each knowledge, the worst case over the attacks whose controls hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import attrs
from attrs import frozen

from vflair_core.attacks.knowledge import shown
from vflair_core.experiments.grading.grades import Grade
from vflair_core.experiments.reports.intervals import change_over_seeds, interval_over_seeds
from vflair_core.experiments.reports.leakage import (
    CONTROL_FAILED,
    NOT_EVALUATED,
    UTILITY_UNKNOWN,
    failed_control,
    is_able,
    knowledge_of,
)
from vflair_core.experiments.reports.settings import Group, Setting


@frozen
class Standing:
    """One row of the ranking: a defended setting beside its undefended reference, at one knowledge.

    `score` is the chance-normalised DCS against the attack that leaves least of it, as the mean over seeds.
    """

    group: Group
    setting: Setting
    knowledge: str
    score: float
    score_range: tuple[float, float]  # over seeds
    attack: str
    target: str
    undefended: float
    defended: float
    interval: tuple[float, float]
    change: tuple[float, float] | None
    floor: float
    utility: float
    positive_control: float
    negative_control: float
    marks: tuple[str, ...] = ()
    rank: int = 0


@frozen
class Unranked:
    """A defended setting that has no place in the ranking, and why."""

    group: Group
    setting: Setting
    knowledge: str  # "" of all
    reason: str


@frozen
class _Against:
    """One attack on one setting, seed by seed."""

    before: tuple[Grade, ...]
    after: tuple[Grade, ...]
    scores: tuple[float | None, ...]
    lacking: int = 0  # seeds with which it was not run

    @property
    def name(self) -> str:
        return f"{self.after[0].attack} ({shown(self.after[0].knowledge)})"

    def why_not(self) -> str:
        """Why this attack ranks nothing, or ""."""
        if self.lacking:
            return f"{self.name} was not run with every seed"
        for grade in (*self.before, *self.after):
            if grade.negative_control is None:
                return f"{self.name} has no negative control"
        if any(grade.positive_control is None for grade in self.after):
            return f"{self.name} has no positive control"
        wrong = [g.verdict for g in (*self.after, *self.before) if g.verdict != "ok"]
        if wrong:
            return f"{self.name}: {wrong[0]}"
        return f"{self.name} has no score" if None in self.scores else ""

    @property
    def informative(self) -> bool:
        """Whether it finds something without a defense."""
        return all(grade.informative for grade in self.after)

    @property
    def left_undefended(self) -> float:
        """The share of what its floor does not know that it does not find without a defense either."""
        each = [
            (1 - grade.attack_performance) / max(1 - grade.floor, 1e-9) for grade in self.before
        ]
        return sum(each) / len(each)

    @property
    def score(self) -> float:
        each = [score for score in self.scores if score is not None]
        return sum(each) / len(each)


def standings_of(groups: Iterable[Group]) -> tuple[list[Standing], list[Unranked]]:
    """Rank the defended settings of each group at each knowledge; the best is first."""
    ranked, unranked = list[Standing](), list[Unranked]()
    for group in groups:
        defended = [setting for setting in group.settings if setting.defended]
        grades = [g for s in defended for t in s.trials for g in t.grades["defended"]]
        for setting in defended:
            if not any(trial.grades["defended"] for trial in setting.trials):
                unranked.append(Unranked(group, setting, "", "no attack ran"))
        for knowledge in knowledge_of(grades):
            rows = [_standing(group, setting, knowledge) for setting in defended]
            unranked += [row for row in rows if isinstance(row, Unranked)]
            placed = [row for row in rows if isinstance(row, Standing)]
            placed.sort(key=lambda row: -row.score)
            better = [sum(other.score > row.score for other in placed) for row in placed]
            ranked += [attrs.evolve(row, rank=n + 1) for row, n in zip(placed, better, strict=True)]
    return ranked, unranked


def _standing(group: Group, setting: Setting, knowledge: str) -> Standing | Unranked | None:
    able = [each for each in _against(setting) if is_able(each.after[0], knowledge)]
    if not able:
        return None
    reasons = [reason for each in able if (reason := each.why_not())]
    sound = [each for each in able if not each.why_not()]
    if not sound:
        return Unranked(group, setting, knowledge, "; ".join(reasons))
    missing = [each for each in _strongest_undefended(able) if each.informative and each.why_not()]
    if missing:  # the others would make a worst case that is none
        reasons = [f"{each.why_not()}; without a defense no attack finds more" for each in missing]
        return Unranked(group, setting, knowledge, "; ".join(reasons))
    worst = min(sound, key=lambda each: each.score)
    scores = [score for score in worst.scores if score is not None]
    count = len(setting.trials)
    return Standing(
        group=group,
        setting=setting,
        knowledge=knowledge,
        score=worst.score,
        score_range=(min(scores), max(scores)),
        attack=worst.name,
        target=worst.after[0].target,
        undefended=sum(g.attack_performance for g in worst.before) / count,
        defended=sum(g.attack_performance for g in worst.after) / count,
        interval=interval_over_seeds(worst.after),
        change=change_over_seeds(worst.before, worst.after),
        floor=sum(g.floor for g in worst.before) / count,
        utility=sum(trial.utility for trial in setting.trials) / count,
        positive_control=min(g.positive_control or 0.0 for g in worst.after),
        negative_control=max(g.negative_control or 0.0 for g in worst.after),
        marks=_marks(setting, able, worst),
    )


def _strongest_undefended(able: Sequence[_Against]) -> list[_Against]:
    """Of each target, the attack that finds most without a defense."""
    best: dict[str, _Against] = {}
    for each in sorted(able, key=lambda each: each.left_undefended):
        best.setdefault(each.after[0].target, each)
    return list(best.values())


def _marks(setting: Setting, able: Sequence[_Against], worst: _Against) -> tuple[str, ...]:
    """What stands beside a score so that nobody takes it for more than it is."""
    target = worst.after[0].target
    failed = [each for each in able if any(map(failed_control, (*each.before, *each.after)))]
    marks = [f"{CONTROL_FAILED}: {each.name} is left out" for each in failed]
    if not all(trial.evaluated(target) for trial in setting.trials):
        marks.append(f"{NOT_EVALUATED}: no attack took the defense into account")
    if not all(trial.learns for trial in setting.trials):
        marks.append(f"{UTILITY_UNKNOWN}: the undefended model is at chance")
    return tuple(marks)


def _against(setting: Setting) -> list[_Against]:
    """The attacks on a setting, each with its grades in both arms and its score, seed by seed."""
    found: dict[tuple[Any, ...], list[tuple[Grade, Grade, float | None]]] = {}
    for trial in setting.trials:
        arms = (trial.grades["undefended"], trial.grades["defended"], trial.scores)
        seen = Counter[tuple[Any, ...]]()
        for before, after, score in zip(*arms, strict=True):
            which = (after.attack, after.knowledge, after.target)
            found.setdefault((*which, seen[which]), []).append((before, after, score))
            seen[which] += 1
    against = []
    for rows in found.values():
        plain, defended = tuple(row[0] for row in rows), tuple(row[1] for row in rows)
        scores = tuple(row[2] for row in rows)
        against.append(_Against(plain, defended, scores, len(setting.trials) - len(rows)))
    return against
