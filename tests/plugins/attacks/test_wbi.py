"""Relaxed tokens: the text is found whatever the blocks, and memory is that of a block."""

from __future__ import annotations

import pytest
import torch

from vflair_attacks.wbi import WhiteBoxInversion
from vflair_core import Partition
from vflair_core.attacks.attack import launch
from vflair_core.testing import crossed, tiny_model

VOCABULARY = 300


def victims(kind="gpt2", lengths=(8, 8, 5)):
    task = {"task": "classification"} if kind == "bert" else {}
    size = {"vocab_size": VOCABULARY, "hidden_size": 32, "initializer_range": 0.02}
    rows = [torch.randint(3, VOCABULARY, (n,)) for n in lengths]
    return rows, crossed(tiny_model(kind, **size, **task), Partition(1, 1), rows)


def accuracy(guess, rows) -> float:
    hits = [
        (found[: len(row)] == row).float() for found, row in zip(guess.tokens, rows, strict=True)
    ]
    return float(torch.cat(hits).mean())


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize("block", [3, 16])
def test_undefended_text_is_recovered_in_blocks_and_whole(kind, block):
    rows, knowledge = victims(kind)
    guess = launch(WhiteBoxInversion(block=block, steps=200), knowledge)
    assert accuracy(guess, rows) > 0.9
    assert bool((guess.tokens[~knowledge["mask"]] == -1).all())


def test_no_tensor_is_larger_than_a_block_of_the_vocabulary(monkeypatch):
    """All tensors of the size of V are made by `softmax`; a text of 12 positions never makes one of more than 2."""
    rows, knowledge = victims(lengths=(12, 12))
    seen, softmax = [], torch.Tensor.softmax

    def watched(self, *args):
        seen.append(self.numel())
        return softmax(self, *args)

    monkeypatch.setattr(torch.Tensor, "softmax", watched)
    launch(WhiteBoxInversion(block=2, batch=1, steps=3), knowledge)
    assert max(seen) == 2 * VOCABULARY
    assert len(rows) == 2


def test_a_limit_on_seconds_is_kept():
    _, knowledge = victims(lengths=(12,) * 8)
    guess = launch(WhiteBoxInversion(block=2, steps=10**6, seconds=0.5), knowledge)
    assert guess.budget["forwards"] < 10**5
