"""A study that really ran, small: two seeds at two cuts, and one cell that failed."""

from __future__ import annotations

import pytest
import torch

from support.paths import SAMPLE_PLUGIN
from support.small_models import LLAMA
from vflair_core import Guess, hookimpl, plugin_manager, run
from vflair_core.errors import PartitionError
from vflair_core.experiments.config import experiment_from
from vflair_core.experiments.studies.cell import Cell


class Nearest:
    """An attack that finds something: for each row the token whose embedding is nearest."""

    @hookimpl
    def vflair_attacks(self):
        return {"nearest": nearest}


def nearest(smashed, mask, embeddings):
    tokens = torch.cdist(smashed, embeddings[None].expand(len(smashed), -1, -1)).argmin(-1)
    return Guess(tokens=torch.where(mask, tokens, -1))


@pytest.fixture(scope="session")
def ran():
    pm = plugin_manager([SAMPLE_PLUGIN], entry_point_group="vflair.none")
    pm.register(Nearest())
    cells = []
    for head in (1, 2):
        cells += [_cell(pm, head, seed) for seed in (0, 1)]
    cells.append(_cell(pm, 4, 0))  # the model has three blocks
    return cells


def _cell(pm, head, seed):
    experiment = experiment_from(
        {
            "seed": seed,
            "task": {"name": "words"},
            "model": {"config": LLAMA, "vocab_size": 300},
            "partition": {"head": head, "tail": 0},
            "train": {"steps": 4, "batch_size": 4, "max_length": 16, "learning_rate": 0.01},
            "victims": {"count": 6, "max_length": 12, "bypass": 2, "queries": 2},
            "isolation": "inline",
            "attacks": [
                {"name": "first-row", "knowledge": "K1"},
                {"name": "nearest", "knowledge": "K1"},
            ],
            "defenses": [{"name": "shift"}],
        }
    )
    labels = {"head": str(head), "defense": "shift", "seed": str(seed)}
    try:
        return Cell(experiment.digest, labels, experiment, run(experiment, plugins=pm))
    except PartitionError as error:
        return Cell(experiment.digest, labels, experiment, error=f"PartitionError: {error}")
