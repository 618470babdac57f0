"""Anchor 6 of the reference: DAGER is exact below the width and finds nothing at it."""

from __future__ import annotations

import pytest
import torch

from vflair_attacks.dager import Dager
from vflair_core import Partition, split
from vflair_core.attacks.halves import halves
from vflair_core.testing import tiny_model

pytestmark = pytest.mark.slow
WIDTH = 32


@pytest.mark.parametrize("rows", [8, 16, 24, WIDTH - 2, WIDTH - 1, WIDTH])
def test_text_is_exact_while_rows_with_a_gradient_are_fewer_than_the_width(rows):
    """Of T tokens, T − 1 have a gradient: fused query, key and value, raw gradient, one example.

    The inputs come out of a LayerNorm and have mean zero, so they fill WIDTH − 1 dimensions, not WIDTH.
    """
    off = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    sizes = {"vocab_size": 500, "hidden_size": WIDTH, "initializer_range": 0.2, **off}
    model = tiny_model("gpt2", **sizes)
    head, _ = halves(model, Partition(2, 1))
    party, _ = split(model, Partition(2, 1))
    ids = torch.randint(3, 500, (1, rows + 1), generator=torch.Generator().manual_seed(rows))
    party.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    update = {n: w.grad for n, w in party.model.named_parameters() if w.grad is not None}
    found = Dager()([update], torch.tensor([rows + 1]), head).tokens[0, :rows]
    share = float((found == ids[0, :rows]).float().mean())
    assert share == (1.0 if rows < WIDTH - 1 else 0.0)


@pytest.mark.parametrize("length", [2, 4, 6, 7, 8])
def test_a_batch_is_exact_while_all_its_rows_are_fewer_than_the_width(length):
    """Eight texts share an update of width 64: b·T = 16 to 56 rows are read, 64 are not."""
    off = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    sizes = {"vocab_size": 500, "hidden_size": 64, "initializer_range": 0.2, **off}
    model = tiny_model("gpt2", **sizes)
    head, _ = halves(model, Partition(2, 1))
    party, _ = split(model, Partition(2, 1))
    ids = torch.randint(3, 500, (8, length + 1), generator=torch.Generator().manual_seed(length))
    party.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    update = {n: w.grad for n, w in party.model.named_parameters() if w.grad is not None}
    found = Dager()([update], torch.full((8,), length + 1), head).tokens[:, :length]
    if 8 * length < 64 - 1:
        assert sorted(found.tolist()) == sorted(ids[:, :length].tolist())
    else:
        assert bool((found == -1).all())
