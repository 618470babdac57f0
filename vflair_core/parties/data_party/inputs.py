"""What a call of the model was given: its cache, its masks, how many positions cross."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from attrs import frozen
from torch import Tensor
from transformers.cache_utils import Cache

from vflair_core.communication.message import Role
from vflair_core.tasks.collation import Owner, Owners


@frozen(eq=False)
class RowPlacement:
    """How the rows of a call crossed: `places` has the row of each in the messages, (B,), and `learnt` how many labels
    every row of the messages brings into the loss, (B',); B' > B where a defense adds rows.
    """

    places: Tensor
    learnt: Tensor

    @property
    def shares(self) -> Tensor:
        """How much of the loss, a mean over all labels, is of each row of the call: (B,)."""
        learnt = self.learnt.cpu()
        return learnt[self.places.cpu()] / learnt.sum().clamp_min(1)


def rows_of(inputs: Mapping[str, Any]) -> int:
    """How many rows a call has."""
    tokens = [inputs.get(name) for name in ("input_ids", "inputs_embeds", "decoder_input_ids")]
    tensors = [v for v in (*tokens, *inputs.values()) if isinstance(v, Tensor) and v.dim()]
    return len(tensors[0]) if tensors else 1


def repeated(owners: Owners, rows: int) -> Owners:
    """Owners of `rows` rows that were made of theirs: each repeated as beams are, or anybody's if that does not fit."""
    if not owners or rows == len(owners):
        return owners
    if rows % len(owners) == 0:
        return tuple(row for row in owners for _ in range(rows // len(owners)))
    everybody = tuple(dict.fromkeys(owner for row in owners for owner in row))
    return (everybody,) * rows


def placed(owners: Owners, places: Tensor, rows: int) -> Owners:
    """Owners of the `rows` that cross, of which `places` are those of the call; the others are nobody's."""
    found: list[tuple[Owner, ...]] = [()] * rows
    for owner, place in zip(owners, places.tolist(), strict=True):
        found[place] = owner
    return tuple(found)


def learnt_of(inputs: Mapping[str, Any], *, shifted: bool) -> Tensor:
    """How many labels each row of a call brings into the loss, (B,); one if they are not of positions.

    In a `shifted` model the label of a position is the next token, so the first is never one.
    """
    labels = inputs.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() < 2:
        return torch.ones(rows_of(inputs), dtype=torch.long)
    return (labels[:, 1:] if shifted else labels).ne(-100).sum(1)


def cache_in(inputs: Mapping[str, Any]) -> Cache | None:
    """The cache among the arguments of a call."""
    return next((value for value in inputs.values() if isinstance(value, Cache)), None)


def positions_of(leaves: list[Tensor], roles: tuple[Role, ...]) -> int:
    """How many positions of hidden states cross."""
    hidden = [leaf for leaf, role in zip(leaves, roles, strict=True) if role == "smashed"]
    if not hidden or hidden[0].dim() < 2:
        return 1
    return hidden[0].shape[
        1 if hidden[0].dim() == 2 else -2
    ]  # some models have several streams in front


def new_positions(inputs: Mapping[str, Any]) -> int:
    """How many positions the stack that is given fewest reads anew; 1 where nothing has positions."""
    names = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", "labels")
    given = [inputs.get(name) for name in names]
    return min((t.shape[1] for t in given if isinstance(t, Tensor) and t.dim() > 1), default=1)


def mask_of(inputs: Mapping[str, Any], positions: int) -> Tensor | None:
    """The (B, T) mask of real tokens of the last `positions`; None if there is none."""
    mask = inputs.get("attention_mask")
    return mask[:, -positions:] if isinstance(mask, Tensor) and mask.dim() == 2 else None


def answer_mask(inputs: Mapping[str, Any], positions: int) -> Tensor | None:
    """The mask of what a decoder reads: its own, else where there is something to learn, else none."""
    mask = inputs.get("decoder_attention_mask")
    labels = inputs.get("labels")
    if mask is None and isinstance(labels, Tensor) and labels.shape[1:] == (positions,):
        return (labels != -100).long()
    return mask[:, -positions:] if isinstance(mask, Tensor) and mask.dim() == 2 else None


def all_ones(inputs: Mapping[str, Any]) -> bool | None:
    """Whether nothing is padded; None without a mask."""
    mask = inputs.get("attention_mask")
    return bool(mask.all()) if isinstance(mask, Tensor) else None
