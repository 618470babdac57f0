"""A study on Ray and on Dask, each as a cluster of this one machine: `nox -s clusters` installs them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from support.paths import SAMPLE_PLUGIN
from support.small_models import LLAMA
from vflair_core.errors import ExperimentError
from vflair_core.experiments.studies.grid import grid_from
from vflair_core.experiments.studies.study import study

GRID = {
    "experiment": {
        "task": {"name": "words"},
        "model": {"config": LLAMA, "vocab_size": 300},
        "partition": {"head": 1, "tail": 1},
        "train": {"steps": 2, "batch_size": 4, "max_length": 16},
        "victims": {"count": 4, "max_length": 12, "bypass": 2, "queries": 2},
        "attacks": [{"name": "first-row", "knowledge": "K1"}],
        "isolation": "inline",
    },
    "axes": {"defense": [{"label": "none"}, {"label": "shift", "defenses": [{"name": "shift"}]}]},
}


@pytest.fixture
def alone(tmp_path):
    """What this process finds by itself."""
    cells = study(
        grid_from(GRID), tmp_path / "alone.db", backend="sequential", plugins=[SAMPLE_PLUGIN]
    )
    return [cell.result.numbers_hash for cell in cells]


# Of Ray and Dask themselves, as they start and stop.
@pytest.mark.filterwarnings("ignore")
def test_on_ray(tmp_path, alone):
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    path = os.pathsep.join(p for p in (os.environ.get("PYTHONPATH"), str(Path.cwd())) if p)
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": path}},
    )
    try:
        cells = study(
            grid_from(GRID), tmp_path / "ray.db", workers=2, backend="ray", plugins=[SAMPLE_PLUGIN]
        )
    finally:
        ray.shutdown()
    assert [cell.result.numbers_hash for cell in cells] == alone


@pytest.mark.filterwarnings("ignore")
def test_on_dask(tmp_path, alone):
    distributed = pytest.importorskip("distributed", reason="Dask is not installed")
    with distributed.Client(n_workers=2, threads_per_worker=1, dashboard_address=None):
        cells = study(
            grid_from(GRID),
            tmp_path / "dask.db",
            workers=2,
            backend="dask",
            plugins=[SAMPLE_PLUGIN],
        )
    assert [cell.result.numbers_hash for cell in cells] == alone


@pytest.mark.parametrize(("backend", "package"), [("ray", "ray"), ("dask", "distributed")])
def test_a_cluster_that_is_not_installed_is_named_and_nothing_is_made(
    tmp_path, monkeypatch, backend, package
):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == package else find(name, *rest),
    )
    with pytest.raises(ExperimentError, match=rf"{backend}.*pip install.*Nothing was run"):
        study(grid_from(GRID), tmp_path / "s.db", backend=backend, plugins=[SAMPLE_PLUGIN])
    assert not list(tmp_path.iterdir())
