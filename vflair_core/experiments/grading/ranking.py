"""Which attack was the strongest at each preset of knowledge."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from vflair_core.attacks.knowledge import DEFENSE, PRESETS, granted, shown
from vflair_core.experiments.grading.grades import Grade

NOT_EVALUATED = (
    "NOT EVALUATED: no attack of this run on them knows the defense or learned from what comes through it. A low AP "
    "shows that the attacks were not made for it"
)


def strongest(grades: Sequence[Grade]) -> list[dict[str, Any]]:
    """Return the strongest attack of each target at each preset, among attacks that need no more than it grants.

    What an attack was granted beyond all presets, such as `queries` or `known_labels`, makes rows of its own, in which
    it competes with those that did without; so does the defense told to who has not the current weights (`K2 + mechanism`), as
    the provider of a model whose head was fine-tuned. The attack is chosen by its performance on the development victims where
    there are any, and reported on the others; on a scale on which its own floor is 0, as floors differ. Attacks whose
    controls failed and those that find nothing without a defense are left out; a preset without an attack has no row.
    """
    sound = [grade for grade in grades if grade.verdict == "ok"]
    rows = []
    for extra in sorted({_beyond(grade) for grade in sound} | {()}, key=lambda e: (len(e), e)):
        so_far: dict[str, Grade] = {}  # by target
        for preset, names in PRESETS.items():
            for target in sorted({grade.target for grade in sound}):
                able = [
                    grade
                    for grade in sound
                    if grade.target == target and _granted(grade) <= names | set(extra)
                ]
                meant = not extra or any(_beyond(grade) == extra for grade in able)
                if able and meant and not (extra and names >= set(extra)):
                    # Whoever knows more can do what less would do: no preset is shown below the one before.
                    best, before = max(able, key=_chosen_by), so_far.get(target)
                    carried = before and before.attack_performance > best.attack_performance
                    so_far[target] = before if before and carried else best
                    rows.append(_row(so_far[target], preset, extra, carried=bool(carried)))
    return rows


def _row(best: Grade, preset: str, extra: tuple[str, ...], *, carried: bool) -> dict[str, Any]:
    return {
        "knowledge": " + ".join((preset, *extra)),
        "target": best.target,
        "attack": best.attack,
        "attack_knowledge": shown(best.knowledge),
        "attack_performance": best.attack_performance,
        "interval": list(best.interval),
        "floor": best.floor,
        "adaptive": best.adaptive,
        "chosen_on": "reported" if carried or best.development is None else "development",
    }


def _granted(grade: Grade) -> frozenset[str]:
    return granted(grade.knowledge)


def _beyond(grade: Grade) -> tuple[str, ...]:
    """What it was granted that no preset grants, at least not to who has not the current weights."""
    names = _granted(grade)
    defense = frozenset(DEFENSE) & names if not names & {"current_head", "current_tail"} else set()
    return tuple(sorted((names - PRESETS["K4"]) | defense))


def _chosen_by(grade: Grade) -> float:
    reached = grade.attack_performance if grade.development is None else grade.development
    return above_floor(reached, grade.floor)


def above_floor(attack: float, floor: float) -> float:
    """Attack performance on a scale where 0 is its floor and 1 is everything; negative below the floor."""
    return (attack - floor) / (1 - floor) if floor < 1 else 0.0


def evaluated(
    grades: Sequence[Grade], covers: Iterable[str], task_kind: str, *, as_told: bool = True
) -> dict[str, bool]:
    """Return, for each target that is attacked or covered, whether an attack on it took the defense into account.

    It must have been informative, and have passed its controls; nothing counts where the mechanism that attackers were
    told is not what the defense does, or where it does something else to victims, who cross alone, than to training. Responses are a target of their own where victims have
    any, else tokens like prompts; labels and gradients are the labels of classes and numbers, and tokens where the task
    is text.
    """
    named = "labels" if task_kind in ("classification", "regression") else "tokens"
    response = "response" if any(grade.target == "response" for grade in grades) else "tokens"
    meant = {"prompt": "tokens", "response": response, "labels": named, "gradients": named}
    targets = {grade.target for grade in grades} | {meant[place] for place in covers}
    known = {grade.target for grade in grades if grade.adaptive and grade.verdict == "ok"}
    return {target: as_told and target in known for target in sorted(targets)}
