"""One cell of a study: an experiment, where it stands in the grid, and what it found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attrs import field, frozen

from vflair_core.experiments.experiment import Experiment
from vflair_core.experiments.grading.grades import Grade
from vflair_core.experiments.result import Result


@frozen
class Cell:
    """One experiment of a study, and what it found once it is done.

    Attributes:
        key: Hash of all that decides its numbers.
        labels: What it is on each axis of the grid, as the study names it, e.g. {"defense": "dp-forward", "seed": "0"}.
        experiment: What is run; of a tuned cell, with the option that was found.
        result: What was found; None before.
        grades: The grades of each arm, with what was right of each victim, for intervals over several cells.
        tuned: Of a tuned cell: option, value, keep, budget (of trials), target, chance, and `trials`, each with value and main_performance.
        error: Why there is no result: a piece of it failed, or tuning found no setting.
    """

    key: str
    labels: Mapping[str, str]
    experiment: Experiment
    result: Result | None = None
    grades: Mapping[str, Sequence[Grade]] = field(factory=dict)
    tuned: Mapping[str, Any] | None = None
    error: str = ""

    @property
    def failed(self) -> bool:
        """Whether something went wrong, so that trying again may help."""
        return self.result is None and bool(self.error) and not self.without_setting

    @property
    def without_setting(self) -> bool:
        """Whether tuning found no setting that keeps enough utility, which is an outcome."""
        return self.tuned is not None and self.tuned["value"] is None
