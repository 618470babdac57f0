"""Several seeds of one experiment together: means, intervals and paired changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vflair_core.attacks.knowledge import shown
from vflair_core.experiments.grading.grades import Grade
from vflair_core.experiments.grading.pooling import paired_change, pooled_performance

if TYPE_CHECKING:
    from vflair_core.experiments.arm import Arm


def over_seeds(runs: Mapping[int, Mapping[str, Arm]]) -> dict[str, Any]:
    """Return means over seeds and, for each attack, the paired change from undefended to defended.

    `runs` holds the arms of each seed. Intervals resample seeds, and victims, the same ones on both sides and, as seeds share
    the task's texts, with every seed (`grading/pooling.py`).
    """
    arms = list(runs.values())
    names = list(arms[0])
    rows: dict[str, Any] = {
        "seeds": list(runs),
        "main_performance": {
            name: _mean([run[name].numbers["main_performance"] for run in arms]) for name in names
        },
        "attacks": [],
    }
    for number, grade in enumerate(arms[0][names[0]].grades):
        each = {name: [run[name].grades[number] for run in arms] for name in names}
        row: dict[str, Any] = {"attack": grade.attack, "knowledge": shown(grade.knowledge)}
        row["target"] = grade.target
        row |= {name: _mean([g.attack_performance for g in each[name]]) for name in names}
        row["floor"] = _mean([g.floor for g in each[names[-1]]])
        same = len({len(g.hits) for grades in each.values() for g in grades}) == 1
        found = {name: pooled_performance(each[name], same_victims=same) for name in names}
        row["intervals"] = {name: list(estimate.interval) for name, estimate in found.items()}
        row["design_effects"] = {name: estimate.design_effect for name, estimate in found.items()}
        if len(names) > 1:
            change = paired_change(*each.values(), same_victims=same)
            row["change"] = row[names[1]] - row[names[0]]
            row["change_interval"] = list(change.interval)
            row["change_design_effect"] = change.design_effect
        rows["attacks"].append(row)
    rows["adaptive"] = _against_blind([run[names[-1]].grades for run in arms])
    return rows


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
            pair = [[each[n] for each in grades] for n in (b, k)]
            same = len({len(grade.hits) for side in pair for grade in side}) == 1
            rates = [_mean([grade.attack_performance for grade in side]) for side in pair]
            rows.append(
                {
                    "attack": blind.attack,
                    "blind": shown(blind.knowledge),
                    "adaptive": shown(knowing.knowledge),
                    "attack_performance": rates,
                    "gain": rates[1] - rates[0],
                    "gain_interval": list(paired_change(*pair, same_victims=same).interval),
                }
            )
    return rows


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
