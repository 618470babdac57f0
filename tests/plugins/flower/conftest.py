"""What tests of the Flower apps share. Without Flower each module of them is skipped, so nothing of it is imported here."""

from __future__ import annotations

import pytest

from support.flower_premises import make_premises


@pytest.fixture
def premises(tmp_path):
    """A folder with a model, and the records of two nodes in two formats."""
    return make_premises(tmp_path)


@pytest.fixture
def grid(premises, monkeypatch):
    """Flower's part played in this process: each message is answered by the data party's app at once."""
    from flwr.supercore.task_identity import TaskIdentity

    from support.flower_grid import RUN, ThisProcess

    for name, number in (("_run_id", RUN), ("_node_id", 1), ("_task_id", 1)):
        monkeypatch.setattr(TaskIdentity, name, number)  # a process of Flower's is told it
    return ThisProcess(premises.run, premises.nodes)
