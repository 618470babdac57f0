"""Scores of a defense: how far both privacy and utility are kept."""

from __future__ import annotations

import math


def dcs(attack: float, main: float, undefended_main: float, *, beta: float = 0.5) -> float:
    """Defense capability score of VFLAIR-LLM (arXiv 2508.03097), with AP* = 0 and MP* = `undefended_main`.

    In [0.5, 1], higher is better. Not comparable between tasks: where MP* is low, lost utility costs little.
    """
    privacy, utility = max(attack, 0.0), max(undefended_main - main, 0.0)
    return 1 / (1 + math.sqrt((1 - beta) * privacy**2 + beta * utility**2))


def above_floor(attack: float, floor: float) -> float:
    """Attack performance on a scale where 0 is its floor and 1 is everything; negative below the floor."""
    return (attack - floor) / (1 - floor) if floor < 1 else 0.0


def normalised_dcs(
    attack: float, floor: float, undefended_attack: float,
    main: float, chance: float, undefended_main: float,
) -> float:  # fmt: skip
    """DCS on scales where 0 is chance and 1 is undefended, so that tasks can be compared."""
    span = undefended_attack - floor
    leaked = min(max((attack - floor) / span, 0.0), 1.0) if span > 0 else 0.0
    reach = undefended_main - chance
    kept_utility = min(max((main - chance) / reach, 0.0), 1.0) if reach > 0 else 1.0
    return dcs(leaked, kept_utility, 1.0)
