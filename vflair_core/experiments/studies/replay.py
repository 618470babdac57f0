"""Observers are told of a cell as of a run: what happened in its pieces, in order, when all of them are done.

The pieces themselves ran at other times, in other processes, for several cells at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vflair_core.experiments.attack_phase import REFERENCES
from vflair_core.experiments.studies.cell import Cell
from vflair_core.plugins import observe

if TYPE_CHECKING:
    import pluggy


def replay(cell: Cell, plugins: pluggy.PluginManager) -> None:
    """Tell the observers of a cell that is done."""
    if cell.result is None:
        return
    observe(plugins, "vflair_run_started", experiment=cell.experiment)
    for arm in (arm for arm in REFERENCES if arm in cell.result.numbers):
        numbers = cell.result.numbers[arm]
        observe(plugins, "vflair_arm_started", arm=arm, seed=cell.experiment.seed)
        measured = {row["step"]: row["metrics"] for row in numbers["evaluations"]}
        first = min(measured, default=0)
        for step, loss in enumerate(numbers["losses"], start=first + 1):
            if step - 1 in measured:
                _tell_evaluation(plugins, arm, step - 1, measured.pop(step - 1))
            observe(plugins, "vflair_step_finished", arm=arm, step=step, loss=loss)
        for step, metrics in measured.items():
            _tell_evaluation(plugins, arm, step, metrics)
        for grade in cell.grades.get(arm, ()):
            plain = grade.to_dict()
            observe(plugins, "vflair_attack_finished", arm=arm, name=grade.attack, grade=plain)
    observe(plugins, "vflair_run_finished", result=cell.result)


def _tell_evaluation(
    plugins: pluggy.PluginManager, arm: str, step: int, metrics: dict[str, float]
) -> None:
    observe(plugins, "vflair_evaluated", arm=arm, step=step, metrics=metrics)
