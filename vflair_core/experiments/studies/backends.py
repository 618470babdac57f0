"""Where pieces are worked on: in processes of this machine, in this process, on Ray, or on Dask."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, get_args

from vflair_core.errors import ExperimentError, alternatives
from vflair_core.experiments.studies.store import Outcome
from vflair_core.experiments.studies.work import do

Backend = Literal["loky", "sequential", "ray", "dask"]
Task = tuple[str, tuple[Any, ...]]  # its key, and what `do` is called with
Done = tuple[str, Outcome]
Parallel = Callable[[Iterator[Task]], Iterator[Done]]


def parallel_on(backend: Backend, workers: int) -> Parallel:
    """Return what runs tasks and yields what comes of them as they end; a task is asked for when a process is free.

    Raises:
        ExperimentError: There is no process to run on, or the backend is not installed.
    """
    if backend not in get_args(Backend):
        raise ExperimentError(
            f"There is no backend {backend!r}.{alternatives(str(backend), get_args(Backend))}"
        )
    if workers < 1:
        raise ExperimentError(f"workers = {workers}: give 1 or more.")
    if importlib.util.find_spec("joblib") is None:
        raise ExperimentError(
            "A study needs joblib: pip install 'vflair-core[study]'. Nothing was run."
        )
    if backend == "ray":
        _check_installed("ray", "Ray", "ray")
        return partial(_on_ray, workers)
    if backend == "dask":
        _check_installed("distributed", "Dask", '"dask[distributed]"')
    return partial(_by_joblib, backend, workers)


def _check_installed(module: str, name: str, package: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ExperimentError(
            f'backend = "{name.lower()}" needs {name}: pip install {package}. Nothing was run.'
        )


def _by_joblib(backend: Backend, workers: int, tasks: Iterator[Task]) -> Iterator[Done]:
    from joblib import Parallel as RunTasks
    from joblib import delayed, parallel_config

    options = {"n_jobs": workers, "pre_dispatch": "n_jobs", "batch_size": 1}
    with parallel_config(backend=backend):
        run = RunTasks(return_as="generator_unordered", **options)
    yield from run(delayed(_named)(*task) for task in tasks)


def _on_ray(workers: int, tasks: Iterator[Task]) -> Iterator[Done]:
    """Run tasks on Ray; its backend of joblib gives nothing back before all are done."""
    import ray

    remote = ray.remote(max_retries=0)(_named)
    running: dict[Any, str] = {}
    while True:
        for key, task in itertools.islice(tasks, workers - len(running)):
            running[remote.remote(key, task)] = key
        if not running:
            return
        (done,), _ = ray.wait(list(running), num_returns=1)
        key = running.pop(done)
        try:
            yield ray.get(done)
        except ray.exceptions.RayError as error:
            told = f"Its process was ended from outside, as where memory runs out: {error}"
            yield key, Outcome(error=" ".join(told.split()))


def _named(key: str, task: tuple[Any, ...]) -> Done:
    return key, do(*task)
