"""A plugin that writes what happens in a run to where runs are watched: TensorBoard, MLflow, a file of your own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from attrs import define, field

from vflair_core.experiments.figures import (
    Setting,
    error_without_text,
    figures_of,
    figures_of_grade,
    settings_of,
)
from vflair_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from vflair_core.experiments.experiment import Experiment
    from vflair_core.experiments.result import Result


class Logbook(Protocol):
    """Where one run is written."""

    def write(self, series: str, figures: Mapping[str, float], step: int) -> None:
        """Write figures by name. A series is an arm, or ``result`` for what the run says as a whole."""

    def close(self, status: Literal["finished", "failed"], error: str) -> None:
        """Write how the run ended; `error` is empty when it finished."""


Open: TypeAlias = Callable[[str, Mapping[str, Setting]], Logbook]


@define(eq=False)
class Tracker:
    """Writes each run into a logbook of its own: settings, losses, evaluations, grades, costs, and how it ended.

    No text of the task gets there: not an example, not a guess, not the words of an error.

    Attributes:
        open_logbook: Opens the logbook of a run from its name and its settings.
    """

    open_logbook: Open
    _book: Logbook | None = field(default=None, init=False)
    _prefix: str = field(default="", init=False)  # of series, where there are several seeds
    _several: bool = field(default=False, init=False)
    _grades: int = field(default=0, init=False)  # of the arm

    @hookimpl
    def vflair_run_started(self, experiment: Experiment) -> None:
        """Open a logbook."""
        self._close("failed", "not ended")  # by an observer that stopped a strict run
        self._prefix, self._several = "", bool(experiment.seeds)
        name = f"{experiment.task.name}-{experiment.digest}"
        self._book = self.open_logbook(name, settings_of(experiment))

    @hookimpl
    def vflair_arm_started(self, seed: int) -> None:
        """Tell the arms of several seeds apart."""
        self._grades = 0
        self._prefix = f"seed-{seed}/" if self._several else ""

    @hookimpl
    def vflair_step_finished(self, arm: str, step: int, loss: float) -> None:
        """Write the loss."""
        self._write(arm, {"loss": loss}, step)

    @hookimpl
    def vflair_evaluated(self, arm: str, step: int, metrics: Mapping[str, float]) -> None:
        """Write what was found on the test examples."""
        self._write(arm, {f"test/{name}": value for name, value in metrics.items()}, step)

    @hookimpl
    def vflair_attack_finished(self, arm: str, grade: Mapping[str, Any]) -> None:
        """Write a grade; its step is its place in the result's list, since one attack may be launched twice."""
        self._write(arm, figures_of_grade(grade), self._grades)
        self._grades += 1

    @hookimpl
    def vflair_run_finished(self, result: Result) -> None:
        """Write what the run says as a whole."""
        self._prefix = ""
        try:
            self._write("result", figures_of(result), 0)
        finally:
            self._close("finished", "")

    @hookimpl
    def vflair_run_failed(self, error: BaseException) -> None:
        """Write that it failed."""
        self._close("failed", error_without_text(error))

    def _write(self, series: str, figures: Mapping[str, float], step: int) -> None:
        if self._book is not None:  # it could not be opened, which was said
            self._book.write(self._prefix + series, figures, step)

    def _close(self, status: Literal["finished", "failed"], error: str) -> None:
        book, self._book = self._book, None
        if book is not None:
            book.close(status, error)
