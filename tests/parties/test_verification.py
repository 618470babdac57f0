"""The gate for model types: it passes what is listed, and it can say no."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig

from vflair_core import Partition, PartitionError, verify
from vflair_core.testing import tiny_model


def test_a_model_whose_split_differs_is_not_called_exact(monkeypatch):
    """Break the model party by a last-bit change of what it returns."""
    from vflair_core.communication.execution import Execution

    honest = Execution.run

    def off_by_little(self, program):
        return [output * (1 + 1e-6) for output in honest(self, program)]

    monkeypatch.setattr(Execution, "run", off_by_little)
    found = verify(tiny_model("llama").config, Partition(1, 1))
    assert not found.logits_equal
    assert not found.exact


@pytest.mark.parametrize(
    ("kind", "task"),
    [
        ("qwen2", "causal-lm"),
        ("roberta", "classification"),
        ("bert", "question-answering"),
        ("t5", "seq2seq"),
    ],
)
@pytest.mark.parametrize("tail", [0, 1])
def test_each_kind_of_task_is_verified(kind, task, tail):
    sizes = {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_heads": 2, "num_layers": 3}
    if kind == "t5":
        start = {"decoder_start_token_id": 0, "vocab_size": 64, "initializer_factor": 1.0}
        config = AutoConfig.for_model("t5", **sizes, **start)
    else:
        config = tiny_model(kind, task, num_hidden_layers=3).config
    found = verify(config, Partition(1, tail), task=task)
    assert found.exact, found
    assert (found.tokens_equal is None) == (task in {"classification", "question-answering"})


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
