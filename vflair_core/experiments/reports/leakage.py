"""What leaks of a target at a preset of knowledge: the strongest attack over seeds, and whether it can be trusted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from attrs import frozen

from vflair_core.attacks.knowledge import PRESETS, granted, shown
from vflair_core.experiments.grading.grades import Grade
from vflair_core.experiments.grading.ranking import strongest
from vflair_core.experiments.reports.intervals import interval_over_seeds
from vflair_core.experiments.reports.settings import Setting, Trial

UTILITY_UNKNOWN = "utility unknown"
CONTROL_FAILED, NOT_EVALUATED, UNINFORMATIVE = "control failed", "not evaluated", "uninformative"
BASELINE = "linear-inverter"  # what a linear map reads, in seconds and at any cut


@frozen
class Leak:
    """What the strongest attack recovers, as the mean over seeds.

    `mark` is "", or why the number does not say what it seems to: an attack that is stronger, here or without a defense,
    failed a control, no attack took the defense into account, or nothing is found even without a defense.

    `baseline` is what the linear map recovers there, whatever it was granted; None where it was not run with every seed.
    """

    attack_performance: float
    interval: tuple[float, float]
    floor: float
    attacks: tuple[str, ...]  # with their knowledge; several where seeds differ
    adaptive: bool
    mark: str = ""
    baseline: float | None = None


def knowledge_of(grades: Iterable[Grade]) -> tuple[str, ...]:
    """What attackers may know, from little to much, as `strongest` names it: each that lets another set of attacks in."""
    each = list({grade.knowledge: grade for grade in grades}.values())
    extras = {tuple(label_of(grade).split(" + ")[1:]) for grade in each} | {()}
    labels: dict[frozenset[tuple[str, ...]], str] = {}
    for extra in sorted(extras, key=lambda names: (len(names), names)):
        for preset in PRESETS:
            label = " + ".join((preset, *extra))
            able = frozenset(grade.knowledge for grade in each if is_able(grade, label))
            beyond = not extra or any(label_of(g).split(" + ")[1:] == [*extra] for g in each
                                      if g.knowledge in able)  # fmt: skip
            if able and beyond:
                labels.setdefault(able, label)
    return tuple(labels.values())


def label_of(grade: Grade) -> str:
    """The least preset that grants what an attack was granted, and what it was granted beyond."""
    names = granted(grade.knowledge)
    extra = sorted(names - PRESETS["K4"])
    preset = next(name for name, grants in PRESETS.items() if names <= grants | set(extra))
    return " + ".join((preset, *extra))


def is_able(grade: Grade, knowledge: str) -> bool:
    """Whether an attack needs no more than `knowledge` grants."""
    preset, *extra = knowledge.split(" + ")
    return granted(grade.knowledge) <= PRESETS[preset] | set(extra)


def failed_control(grade: Grade) -> bool:
    """Whether a control says that a grade is not the defense's alone, or not of the messages alone."""
    return "control failed" in grade.verdict


def leak_of(setting: Setting, arm: str, knowledge: str, target: str) -> Leak | None:
    """What leaks in an arm of a setting; None where no attack on the target needs no more than `knowledge`."""
    each = [_in_trial(trial, arm, knowledge, target) for trial in setting.trials]
    found = [pair for pair in each if pair is not None]
    if not found:
        return None
    grades = [grade for grade, _ in found]
    marks = [mark for _, mark in found]
    mark = next((m for m in (CONTROL_FAILED, NOT_EVALUATED, UNINFORMATIVE) if m in marks), "")
    return Leak(
        attack_performance=sum(g.attack_performance for g in grades) / len(grades),
        interval=interval_over_seeds(grades),
        floor=sum(g.floor for g in grades) / len(grades),
        attacks=tuple(dict.fromkeys(f"{g.attack} ({shown(g.knowledge)})" for g in grades)),
        adaptive=all(g.adaptive for g in grades),
        mark=mark,
        baseline=_baseline(setting, arm, target),
    )


def _baseline(setting: Setting, arm: str, target: str) -> float | None:
    """What the linear map recovers, as the mean over seeds; of several with sound controls, the one that recovers most."""
    linear = [
        [
            _reached(grade)
            for grade in trial.grades.get(arm, ())
            if is_baseline(grade) and grade.target == target and not failed_control(grade)
        ]
        for trial in setting.trials
    ]
    return sum(map(max, linear)) / len(linear) if all(linear) else None


def is_baseline(grade: Grade) -> bool:
    """Whether a grade is the linear map's."""
    return grade.attack == BASELINE


def _in_trial(trial: Trial, arm: str, knowledge: str, target: str) -> tuple[Grade, str] | None:
    """The strongest attack of one seed, and its mark."""
    grades = trial.grades.get(arm, ())
    able = [grade for grade in grades if grade.target == target and is_able(grade, knowledge)]
    if not able:
        return None
    best = _strongest(grades, able, knowledge, target)
    failed = [grade for grade in able if failed_control(grade)]
    if best is None:
        best = max(failed or able, key=_reached)
        return best, CONTROL_FAILED if failed else UNINFORMATIVE
    if any(_is_stronger(trial, arm, grade, best) for grade in failed):
        return best, CONTROL_FAILED
    return best, NOT_EVALUATED if arm == "defended" and not trial.evaluated(target) else ""


def _strongest(
    grades: Sequence[Grade], able: Sequence[Grade], knowledge: str, target: str
) -> Grade | None:
    """The grade that `strongest` chose; what a preset adds to the one before may be nothing but a wish."""
    rows = [
        row for row in strongest(grades) if (row["knowledge"], row["target"]) == (knowledge, target)
    ]
    for row in rows:
        for grade in able:
            same = (grade.attack, shown(grade.knowledge), grade.attack_performance)
            if grade.verdict == "ok" and same == (
                row["attack"], row["attack_knowledge"], row["attack_performance"],
            ):  # fmt: skip
                return grade
    return None


def _is_stronger(trial: Trial, arm: str, grade: Grade, best: Grade) -> bool:
    """Whether an attack that failed a control finds more than the best that did not, here or without a defense."""
    if _reached(grade) > _reached(best):
        return True
    plain = dict(zip(map(id, trial.grades[arm]), trial.grades["undefended"], strict=True))
    return _reached(plain[id(grade)]) > _reached(plain[id(best)])


def _reached(grade: Grade) -> float:
    return grade.attack_performance
