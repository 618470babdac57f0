"""The gate for model types: it passes what is listed, and it can say no."""

from __future__ import annotations

import pytest
import torch

from vflair_core import Partition, PartitionError, verify
from vflair_core.testing import tiny_model
from vflair_core.verified import VERIFIED


@pytest.mark.parametrize("line", VERIFIED)
def test_every_listed_type_is_exact_for_every_listed_cut(line):
    kind, task = line.split(" · ")
    config = tiny_model(kind, task=task, num_hidden_layers=3).config
    for name in VERIFIED[line]:
        partition = Partition(1, 1) if name == "HBT" else Partition(1, 0)
        found = verify(config, partition, task=task)
        assert found.exact, found


def test_a_model_whose_split_differs_is_not_called_exact(monkeypatch):
    """Break the model party by a last-bit change of what it returns."""
    from vflair_core.program import Execution

    honest = Execution.run

    def off_by_little(self, program):
        return [output * (1 + 1e-6) for output in honest(self, program)]

    monkeypatch.setattr(Execution, "run", off_by_little)
    found = verify(tiny_model("llama").config, Partition(1, 1))
    assert not found.logits_equal
    assert not found.exact


def test_an_unknown_task_and_an_impossible_cut_are_refused():
    config = tiny_model("llama").config
    with pytest.raises(PartitionError, match="Cannot verify task 'poetry'"):
        verify(config, Partition(1, 1), task="poetry")
    with pytest.raises(PartitionError, match="must lie between 0 and 3"):
        verify(config, Partition(2, 2))


def test_verifying_leaves_the_random_state_as_it_was():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    verify(tiny_model("gpt2").config, Partition(1, 1))
    assert torch.equal(torch.rand(3), expected)
