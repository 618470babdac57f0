"""Scores of a defense: how far both privacy and utility are kept, by VFLAIR-LLM's formulas and on scales from chance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from attrs import field, frozen, validators

from vflair_core.attacks.knowledge import PRESETS, shown
from vflair_core.errors import ExperimentError
from vflair_core.experiments.grading.grades import Grade
from vflair_core.experiments.grading.ranking import strongest


def dcs(
    attack: float,
    main: float,
    ideal_main: float,
    *,
    ideal_attack: float = 0.0,
    beta: float = 0.5,
) -> float:
    """Defense capability score of VFLAIR-LLM (arXiv 2508.03097).

    In [0.5, 1], higher is better. Not comparable between tasks: where MP* is low, lost utility costs little.

    Args:
        attack: AP, the attack performance with the defense.
        main: MP, the main performance with the defense.
        ideal_main: MP*, which costs nothing: that without a defense.
        ideal_attack: AP*, which costs nothing.
        beta: Weight of the lost utility; that of privacy is the rest.
    """
    privacy, utility = max(attack - ideal_attack, 0.0), max(ideal_main - main, 0.0)
    return 1 / (1 + math.sqrt((1 - beta) * privacy**2 + beta * utility**2))


def normalised_dcs(
    attack: float, floor: float, undefended_attack: float,
    main: float, chance: float, undefended_main: float,
    *, beta: float = 0.5,
) -> float:  # fmt: skip
    """DCS on scales where 0 is chance and 1 is undefended, so that tasks can be compared."""
    span = undefended_attack - floor
    leaked = min(max((attack - floor) / span, 0.0), 1.0) if span > 0 else 0.0
    reach = undefended_main - chance
    kept_utility = min(max((main - chance) / reach, 0.0), 1.0) if reach > 0 else 1.0
    return dcs(leaked, kept_utility, 1.0, beta=beta)


def type_scores(each: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Return T-DCS: for each type of attack the mean over its attacks of their DCS, given as (type, DCS)."""
    of_type: dict[str, list[float]] = {}
    for kind, score in each:
        of_type.setdefault(kind, []).append(score)
    return {kind: sum(scores) / len(scores) for kind, scores in sorted(of_type.items())}


def comprehensive_score(
    by_type: Mapping[str, float], weights: Mapping[str, float] | None = None
) -> float | None:
    """Return C-DCS: the weighted sum of T-DCS over the types of attacks; None if there are none.

    Raises:
        ExperimentError: The weights are not one for each type, or do not sum to 1.
    """
    if not by_type:
        return None
    weights = equal_weights(by_type) if weights is None else weights
    if set(weights) != set(by_type):
        raise ExperimentError(
            f"Weights are given for {', '.join(sorted(weights)) or 'no type'}, and the types of attacks that rank are "
            f"{', '.join(sorted(by_type))}. Give each of these a weight."
        )
    if min(weights.values()) < 0 or not math.isclose(sum(weights.values()), 1.0, abs_tol=1e-9):
        raise ExperimentError(
            f"The weights of the types of attacks are {dict(weights)}: none may be negative, and they must sum to 1."
        )
    return sum(weights[kind] * score for kind, score in by_type.items())


def equal_weights(by_type: Mapping[str, float]) -> dict[str, float]:
    """The same weight for each type."""
    return {kind: 1 / len(by_type) for kind in by_type}


@frozen
class Utility:
    """What a defense left of the main performance.

    Attributes:
        main: MP in the defended arm.
        undefended: MP in the undefended arm.
        chance: MP of chance.
    """

    main: float
    undefended: float
    chance: float


@frozen
class Formula:
    """The constants of the paper's formulas.

    Attributes:
        beta: Weight of the lost utility.
        ideal_attack: AP*, which costs nothing.
        ideal_main: MP*, which costs nothing; None takes the undefended arm's.
        weights: Of each type of attack (target) in C-DCS; None weighs all alike.
    """

    beta: float = field(default=0.5, validator=[validators.ge(0), validators.le(1)])
    ideal_attack: float = 0.0
    ideal_main: float | None = None
    weights: Mapping[str, float] | None = None


def scores(
    before: Sequence[Grade],
    after: Sequence[Grade],
    utility: Utility,
    formula: Formula | None = None,
) -> dict[str, Any]:
    """Return all scores of a defense: by attack, by type, together, and the worst case at each preset, which ranks.

    An attack that fails a control in either arm, or finds nothing undefended, ranks nothing and is in no mean.

    Args:
        before: Grades of the undefended arm.
        after: Grades of the defended arm, of the same attacks in the same order.
        utility: What was left of it.
        formula: Constants, the paper's by default; they are among the scores.
    """
    formula = formula or Formula()
    ideal = utility.undefended if formula.ideal_main is None else formula.ideal_main
    rows: list[dict[str, Any]] = []
    sound: list[Grade] = []
    for plain, defended in zip(before, after, strict=True):
        row: dict[str, Any] = {"attack": defended.attack, "knowledge": shown(defended.knowledge)}
        row["target"] = defended.target
        row["dcs"] = dcs(
            defended.attack_performance,
            utility.main,
            ideal,
            ideal_attack=formula.ideal_attack,
            beta=formula.beta,
        )
        row["normalised"] = None
        if plain.verdict == defended.verdict == "ok":
            attacks = (defended.attack_performance, plain.floor, plain.attack_performance)
            mains = (utility.main, utility.chance, utility.undefended)
            row["normalised"] = normalised_dcs(*attacks, *mains, beta=formula.beta)
            sound.append(defended)
        rows.append(row)
    ranked = [row for row in rows if row["normalised"] is not None]
    by_type = type_scores([(row["target"], row["dcs"]) for row in ranked])
    return {
        "per_attack": rows,
        "t_dcs": by_type,
        "c_dcs": comprehensive_score(by_type, formula.weights),
        "beta": formula.beta,
        "ideal_attack": formula.ideal_attack,
        "ideal_main": ideal,
        "weights": dict(formula.weights or equal_weights(by_type)),
        "worst_by_preset": _worst_by_preset(sound, ranked),
        "normalised_worst": min((row["normalised"] for row in ranked), default=None),
    }


def _worst_by_preset(
    sound: Sequence[Grade], ranked: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, Any] | None]:
    """The normalised score under the strongest attack of each preset, on whichever target is worse off.

    Who knows more can do what less would do, so it never rises from one preset to the next; None before the first preset
    at which an attack ranks.
    """
    pairs = zip(sound, ranked, strict=True)
    score = {_key(grade.attack_performance, row): row["normalised"] for grade, row in pairs}
    found: dict[str, dict[str, Any] | None] = dict.fromkeys(PRESETS)
    worst: dict[str, Any] | None = None
    for preset in PRESETS:
        for row in strongest(sound):
            if row["knowledge"] != preset:
                continue
            names = {"attack": row["attack"], "knowledge": row["attack_knowledge"]}
            names["target"] = row["target"]
            reached = score[_key(row["attack_performance"], names)]
            if worst is None or reached < worst["normalised"]:
                worst = {**names, "normalised": reached}
        found[preset] = worst
    return found


def _key(performance: float, row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells grades apart, also of one attack that was launched with several options."""
    return row["attack"], row["knowledge"], row["target"], performance
