"""Logits of the scored positions only: less to send in HT, for telling the model party where the answer lies.

In HT the logits of every position come back, though those of a prompt (labels -100) enter no loss. `Partition(only_scored=True)`
gets only the positions that are scored in some row of a batch. Which
these are crosses in the clear, and is recorded with every result.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from vflair_core.errors import PartitionError
from vflair_core.partition.partition import Partition


def only_scored(model: nn.Module, partition: Partition, inputs: dict[str, Any]) -> dict[str, Any]:
    """Ask for the logits of scored positions only, if the partition says so and there are labels.

    `logits` of the outputs have the shape (B, K, V) then, for the K positions that are scored in some row. The
    loss is what it was.

    Args:
        model: A decoder with a language-model head.
        partition: The cut.
        inputs: Of the call; labels (B, T) with -100 where nothing is scored.

    Raises:
        PartitionError: The model cannot give the logits of chosen positions.
    """
    labels = inputs.get("labels")
    if not partition.only_scored or not isinstance(labels, Tensor):
        return inputs
    takes = inspect.signature(model.forward).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in takes.values())
    if partition.tail or labels.dim() != 2 or "logits_to_keep" not in takes or not open_ended:
        raise PartitionError(
            f"only_scored restricts the logits that a decoder returns in HT; {type(model).__name__} cut as "
            f"{partition.kind} has none to restrict. Leave it out of the Partition."
        )
    next_words = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]  # (B, T)
    positions = (next_words != -100).any(0).nonzero().flatten()  # (K,)
    if not len(positions):
        return inputs
    return {**inputs, "logits_to_keep": positions, "shift_labels": next_words[:, positions]}


def is_a_pick(index: Any) -> bool:
    """Whether ``tensor[index]`` picks positions: ``[:, positions, :]`` with whole numbers (K,)."""
    match index:
        case (slice() as first, Tensor() as positions, slice() as last):
            everything = first == last == slice(None)
            return everything and positions.dim() == 1 and positions.dtype is torch.int64
        case _:
            return False
