"""Which attack was the strongest at each preset, and what all of it says over several seeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vflair_core.attacks.knowledge import PRESETS, granted
from vflair_core.experiments.grading.statistics import paired_interval
from vflair_core.experiments.grading.tokens import Grade

if TYPE_CHECKING:
    from vflair_core.experiments.arm import Arm

NOT_EVALUATED = (
    "NOT EVALUATED: no attack of this run on them knows the defense or learned from what comes through it. A low AP "
    "shows that the attacks were not made for it"
)


def strongest(grades: Sequence[Grade]) -> list[dict[str, Any]]:
    """Return the strongest attack of each target at each preset, among attacks that need no more than it grants.

    What an attack was granted beyond all presets, such as `queries` or `known_labels`, makes rows of its own, in which
    it competes with those that did without. The attack is chosen by its performance on the development victims where
    there are any, and reported on the others. Attacks whose controls failed are left out; a preset without an attack
    has no row.
    """
    sound = [grade for grade in grades if "failed" not in grade.verdict]
    rows = []
    for extra in sorted({_beyond(grade) for grade in sound} | {()}, key=lambda e: (len(e), e)):
        for preset, names in PRESETS.items():
            for target in sorted({grade.target for grade in sound}):
                able = [
                    grade
                    for grade in sound
                    if grade.target == target and _granted(grade) <= names | set(extra)
                ]
                if any(_beyond(grade) == extra for grade in able):
                    rows.append(_row(max(able, key=_chosen_by), preset, extra))
    return rows


def _row(best: Grade, preset: str, extra: tuple[str, ...]) -> dict[str, Any]:
    return {
        "knowledge": " + ".join((preset, *extra)),
        "target": best.target,
        "attack": best.attack,
        "attack_knowledge": best.knowledge,
        "attack_performance": best.attack_performance,
        "interval": list(best.interval),
        "floor": best.floor,
        "adaptive": best.adaptive,
        "chosen_on": "reported" if best.development is None else "development",
    }


def _granted(grade: Grade) -> frozenset[str]:
    return granted(grade.knowledge.split("+"))


def _beyond(grade: Grade) -> tuple[str, ...]:
    """What it was granted that no preset grants."""
    return tuple(sorted(_granted(grade) - PRESETS["K4"]))


def _chosen_by(grade: Grade) -> float:
    return grade.attack_performance if grade.development is None else grade.development


def evaluated(grades: Sequence[Grade], covers: Iterable[str], task_kind: str) -> dict[str, bool]:
    """Return, for each target that is attacked or covered, whether an attack on it took the defense into account.

    It must have been informative, and have passed its controls. Responses are a target of their own where victims have
    any, else tokens like prompts; labels and gradients are the labels of classes and numbers, and tokens where the task
    is text.
    """
    named = "labels" if task_kind in ("classification", "regression") else "tokens"
    response = "response" if any(grade.target == "response" for grade in grades) else "tokens"
    meant = {"prompt": "tokens", "response": response, "labels": named, "gradients": named}
    targets = {grade.target for grade in grades} | {meant[place] for place in covers}
    known = {grade.target for grade in grades if grade.adaptive and grade.verdict == "ok"}
    return {target: target in known for target in sorted(targets)}


def over_seeds(runs: Mapping[int, Mapping[str, Arm]]) -> dict[str, Any]:
    """Return means over seeds and, for each attack, the paired change from undefended to defended.

    `runs` holds the arms of each seed. Intervals resample seeds, and sentences in each seed on both sides alike.
    """
    arms = list(runs.values())
    names = list(arms[0])
    found: dict[str, Any] = {
        "seeds": list(runs),
        "main_performance": {
            name: _mean([run[name].numbers["main_performance"] for run in arms]) for name in names
        },
        "attacks": [],
    }
    for number, grade in enumerate(arms[0][names[0]].grades):
        each = {name: [run[name].grades[number] for run in arms] for name in names}
        row: dict[str, Any] = {"attack": grade.attack, "knowledge": grade.knowledge}
        row["target"] = grade.target
        row |= {name: _mean([g.attack_performance for g in each[name]]) for name in names}
        row["floor"] = _mean([g.floor for g in each[names[-1]]])
        if len(names) > 1:
            pairs = [(a.hits, b.hits) for a, b in zip(*each.values(), strict=True)]
            row["change"] = row[names[1]] - row[names[0]]
            row["change_interval"] = list(paired_interval(pairs))
        found["attacks"].append(row)
    found["adaptive"] = _against_blind([run[names[-1]].grades for run in arms])
    return found


def _against_blind(grades: Sequence[Sequence[Grade]]) -> list[dict[str, Any]]:
    """Compare, in the last arm of each seed, an attack that knows the defense with the same attack that does not.

    There is a row for each pair of launches of one attack that differ in that; the interval is paired.
    """
    rows = []
    for b, blind in enumerate(grades[0]):
        for k, knowing in enumerate(grades[0]):
            if (blind.attack, blind.target) != (knowing.attack, knowing.target):
                continue
            if len(blind.hits) != len(knowing.hits):  # one was granted updates of several victims
                continue
            if blind.adaptive or not knowing.adaptive:
                continue
            pairs = [(each[b].hits, each[k].hits) for each in grades]
            rates = [_mean([each[n].attack_performance for each in grades]) for n in (b, k)]
            rows.append(
                {
                    "attack": blind.attack,
                    "blind": blind.knowledge,
                    "adaptive": knowing.knowledge,
                    "attack_performance": rates,
                    "gain": rates[1] - rates[0],
                    "gain_interval": list(paired_interval(pairs)),
                }
            )
    return rows


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
