"""Watch runs in MLflow.

    pip install mlflow
    vflair run experiment.toml --plugin examples/trackers/to_mlflow.py
    mlflow ui

Runs go where MLflow puts them: into mlflow.db beside you, or what MLFLOW_TRACKING_URI names; there into the experiment
`vflair`, or what MLFLOW_EXPERIMENT_NAME names. MLflow's own telemetry is switched off.
"""

from __future__ import annotations

import importlib.util
import os
import re
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from attrs import frozen

from vflair_core import Tracker

if TYPE_CHECKING:
    from mlflow import MlflowClient

if importlib.util.find_spec("mlflow") is None:
    raise ImportError("MLflow is not installed: pip install mlflow.")

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
MOST = 100  # settings or figures that MLflow takes at once


@frozen
class Recorded:
    """One run in MLflow's store."""

    client: MlflowClient
    run: str

    def write(self, series: str, figures: Mapping[str, float], step: int) -> None:
        """Write figures as metrics whose names begin with the series."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [
            Metric(_allowed(f"{series}/{name}"), value, now, step)
            for name, value in figures.items()
        ]
        for start in range(0, len(metrics), MOST):
            self.client.log_batch(self.run, metrics=metrics[start : start + MOST])

    def close(self, status: str, error: str) -> None:
        """Write how the run ended."""
        if error:
            self.client.set_tag(self.run, "error", error)
        self.client.set_terminated(self.run, status.upper())


def open_run(name: str, settings: Mapping[str, str | float]) -> Recorded:
    """Begin a run, with the settings as its parameters."""
    from mlflow import MlflowClient
    from mlflow.entities import Param

    client = MlflowClient()
    experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "vflair")
    found = client.get_experiment_by_name(experiment)
    number = found.experiment_id if found else client.create_experiment(experiment)
    run = client.create_run(number, run_name=name).info.run_id
    params = [Param(_allowed(path), str(value)) for path, value in settings.items()]
    for start in range(0, len(params), MOST):
        client.log_batch(run, params=params[start : start + MOST])
    return Recorded(client, run)


def _allowed(name: str) -> str:
    return re.sub(r"[^\w\-. :/]", "_", name)


plugin = Tracker(open_run)
