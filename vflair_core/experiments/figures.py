"""What may be told of a run to where it is watched: settings and numbers, never a text of the task."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from vflair_core.experiments.experiment import Experiment
    from vflair_core.experiments.result import Result

Setting: TypeAlias = str | int | float | bool
OF_GRADE = (
    *("attack_performance", "interval", "floor", "positive_control", "negative_control"),
    *("by_chance", "informative", "seconds"),
)
OF_ARM = (
    *("main_performance", "chance", "guarantees"),
    *("releases_per_example", "messages_per_example", "gradients_per_example"),
)
OVER_ALL = ("dcs", "over_seeds", "over_seeds_active")


def settings_of(e: Experiment) -> dict[str, Setting]:
    """The settings of an experiment by their path, such as ``train.steps`` or ``defenses.0.name``.

    Of the task's options only numbers are told: a file's name or a prompt may say who is in it. Of a channel, only
    its scheme.
    """
    settings = _leaves(e.to_dict(), ".")
    settings["channel"] = e.channel.partition(":")[0]
    settings["config_hash"] = e.digest
    options = "task.options."
    return {
        path: value
        for path, value in settings.items()
        if not (path.startswith(options) and isinstance(value, str))
    }


def figures_of_grade(grade: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a grade that tables show, under the attack's name, knowledge and target."""
    title = f"{grade['attack']} {grade['knowledge']} {grade['target']}"
    shown = {name: grade[name] for name in OF_GRADE} | {"verdict_ok": grade["verdict"] == "ok"}
    return _numbers({title: shown})


def figures_of(result: Result) -> dict[str, float]:
    """What a finished run says as a whole, by its path in the result file; grades are told by themselves."""
    numbers, cost = result.numbers, result.cost
    arms = {
        arm: {name: found[name] for name in OF_ARM}
        for arm, found in numbers.items()
        if "losses" in found
    }
    over_all = {name: numbers[name] for name in OVER_ALL if name in numbers}
    return _numbers({"numbers": {**arms, **over_all}, "cost": cost})


def error_without_text(error: BaseException) -> str:
    """The kind of an error and where it arose; its words may quote an example, and stay here."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    place = f" in {frames[-1].f_globals.get('__name__')}" if frames else ""
    return type(error).__name__ + place


def _numbers(tree: Any) -> dict[str, float]:
    leaves = _leaves(tree, "/").items()
    return {path: float(value) for path, value in leaves if not isinstance(value, str)}


def _leaves(tree: Any, between: str) -> dict[str, Setting]:
    """Every number and text in nested mappings and lists, by its path; what is left open is left out."""
    if isinstance(tree, Mapping):
        branches = [(str(name), branch) for name, branch in tree.items()]
    elif isinstance(tree, (list, tuple)):
        branches = [(str(number), branch) for number, branch in enumerate(tree)]
    else:
        return {"": tree} if isinstance(tree, (str, int, float)) else {}
    return {
        f"{name}{between}{path}" if path else name: value
        for name, branch in branches
        for path, value in _leaves(branch, between).items()
    }
