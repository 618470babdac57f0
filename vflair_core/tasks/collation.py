"""Rows of tokens to batches, on the data party: pad, mark what is learnt, pack."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from attrs import frozen
from torch import Tensor

from vflair_core.errors import TaskError
from vflair_core.tasks.token_rows import TokenRow, window_target
from vflair_core.tasks.tokenization import InputFormat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100


@frozen
class Owner:
    """Whose a row of a batch is: an example by its `Example.identity`, and how many positions; None for all."""

    identity: bytes
    positions: int | None = None


Owners = tuple[tuple[Owner, ...], ...]  # of each row; one has several where texts are packed


class Batch(dict[str, Tensor]):
    """Tensors by the names of the model's arguments, which know whether the defenses of text have acted on them.

    The mark is on ``input_ids``, so that it outlives ``model(**batch)``. A tensor made of it, a slice or a copy, has
    none and is refused by a data party with defenses of text.
    """

    @property
    def defended(self) -> bool:
        """Whether this batch came through the defenses of text and tokens."""
        return is_defended(self.get("input_ids"))

    def marked(self) -> Batch:
        """Say of this batch that it came through the defenses of text and tokens; return it."""
        self["input_ids"].vflair_defended = True  # type: ignore[attr-defined]
        return self

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on another device, defended as it is; itself if it is there."""
        if all(tensor.device == torch.device(device) for tensor in self.values()):
            return self
        moved = Batch({name: tensor.to(device) for name, tensor in self.items()})
        if (owners := owners_of(self.get("input_ids"))) is not None:
            moved.owned_by(owners)
        return moved.marked() if self.defended else moved

    def owned_by(self, owners: Owners) -> Batch:
        """Say whose each row is; return the batch. The mark is on ``input_ids`` like the other."""
        self["input_ids"].vflair_owners = owners  # type: ignore[attr-defined]
        return self


def is_defended(input_ids: object) -> bool:
    """Whether the ids of a call are those of a defended batch."""
    return bool(getattr(input_ids, "vflair_defended", False))


def owners_of(input_ids: object) -> Owners | None:
    """Whose each row of a batch is, by its ids; None where nobody said."""
    owners: Owners | None = getattr(input_ids, "vflair_owners", None)
    return owners


def digests_of(inputs: Mapping[str, Any]) -> tuple[bytes, ...]:
    """What each row is known by where nobody said whose it is: a digest of its own tokens without padding.

    Empty if there are none.
    """
    names = ("input_ids", "inputs_embeds", "decoder_input_ids")
    content = next((inputs[name] for name in names if inputs.get(name) is not None), None)
    if content is None:
        return ()
    if not content.is_floating_point():
        content = content.long()  # the same tokens, whatever holds them
    mask = inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.shape != content.shape[:2]:
        mask = torch.ones(content.shape[:2])
    rows = [row[real.bool()] for row, real in zip(content.detach(), mask, strict=True)]
    raw = (row.cpu().contiguous().view(torch.uint8).numpy().tobytes() for row in rows)
    return tuple(hashlib.sha256(content_of_row).digest() for content_of_row in raw)


@frozen(eq=False)
class Encoded:
    """A batch as the model takes it, and its rows; those of one example follow each other.

    A row stands in the batch by itself, unless `positions` says where: (line, first position) of each.
    """

    batch: Batch
    rows: list[TokenRow]
    positions: Sequence[tuple[int, int]] = ()

    @property
    def owners(self) -> Owners:
        """Whose each row of the batch is."""
        if not self.positions:
            return tuple((Owner(row.identity),) for row in self.rows)
        lines: list[list[Owner]] = [[] for _ in self.batch["input_ids"]]
        for (line, _), row in zip(self.positions, self.rows, strict=True):
            lines[line].append(Owner(row.identity, len(row.ids)))
        return tuple(map(tuple, lines))

    @property
    def private(self) -> Tensor:
        """Which tokens of ``input_ids`` are private: (B, T), wherever padding or packing put them.

        A token defense that changes the length of rows is not followed.
        """
        ids: Tensor = self.batch["input_ids"]
        found = torch.zeros_like(ids, dtype=torch.bool)
        mask = self.batch.get("attention_mask")
        for number, row in enumerate(self.rows):
            first = 0 if mask is None else int(mask[number].argmax())
            line, start = self.positions[number] if self.positions else (number, first)
            found[line, start : start + len(row.ids)] = torch.tensor(row.private)
        return found


def collate(
    tokenizer: PreTrainedTokenizerBase,
    reading: InputFormat,
    rows: Sequence[TokenRow],
    *,
    side: Literal["left", "right"] = "right",
    learn: bool = True,
) -> Batch:
    """Return input_ids and attention_mask (B, T), padded on `side`, and with `learn` what the kind learns.

    That is, by kind: ``labels`` (B, T), -100 on all but the answer and its end token (``causal-lm`` without
    an answer: on padding only); ``labels`` (B, answer) of a model with two stacks; ``labels`` (B,) of classes or
    numbers; ``start_positions`` and ``end_positions`` (B,).
    """
    ids = _padded([row.ids for row in rows], _padding(tokenizer), side)
    mask = _padded([[1] * len(row.ids) for row in rows], 0, side)
    batch = Batch({"input_ids": ids, "attention_mask": mask})
    if reading.token_types and any(1 in row.types for row in rows):
        batch["token_type_ids"] = _padded([row.types for row in rows], 0, side)
    for name in rows[0].pixels:
        batch[name] = torch.cat([row.pixels[name] for row in rows])
    if learn:
        batch |= _targets(tokenizer, reading, rows)
    return batch


def pack(tokenizer: PreTrainedTokenizerBase, rows: Sequence[TokenRow], max_length: int) -> Encoded:
    """Put several texts into each row of at most `max_length` tokens, in order.

    ``position_ids`` (B, T) begin again with each text; a model that heeds them (`check_packing`) lets no text
    see another. There is no attention_mask: padding is a text of its own, which nothing is learnt from.
    """
    packs: list[list[TokenRow]] = []
    places = []
    for row in rows:
        used = sum(len(other.ids) for other in packs[-1]) if packs else max_length
        if used + len(row.ids) > max_length:
            packs.append([])
            used = 0
        packs[-1].append(row)
        places.append((len(packs) - 1, used))
    longest = max(sum(len(row.ids) for row in pack) for pack in packs)
    ids, positions, labels = [], [], []
    for pack in packs:
        gap = longest - sum(len(row.ids) for row in pack)
        ids.append([token for row in pack for token in row.ids] + [_padding(tokenizer)] * gap)
        positions.append([n for row in pack for n in range(len(row.ids))] + list(range(gap)))
        # The first token of a text is not what the text before it continues with.
        learnt = [[IGNORED, *_learnt(row)[1:]] for row in pack]
        labels.append([token for row in learnt for token in row] + [IGNORED] * gap)
    lists = {"input_ids": ids, "position_ids": positions, "labels": labels}
    batch = Batch({name: torch.tensor(value) for name, value in lists.items()})
    return Encoded(batch, list(rows), places)


def _learnt(row: TokenRow) -> list[int]:
    """Of a row that continues: the ids of its answer, or all of them where there is none."""
    pairs = zip(row.ids, row.learnt, strict=True)
    return [token if learnt else IGNORED for token, learnt in pairs]


def _targets(
    tokenizer: PreTrainedTokenizerBase, reading: InputFormat, rows: Sequence[TokenRow]
) -> dict[str, Tensor]:
    match reading.kind:
        case "classification":
            return {"labels": torch.tensor([_whole(row) for row in rows])}
        case "regression":
            return {"labels": torch.tensor([_number(row) for row in rows])}
        case "question-answering":
            firsts = [_first(tokenizer, row) for row in rows]
            ends = [window_target(row, first) for row, first in zip(rows, firsts, strict=True)]
            return {
                "start_positions": torch.tensor([start for start, _ in ends]),
                "end_positions": torch.tensor([end for _, end in ends]),
            }
        case "seq2seq":
            return {"labels": _padded([_wanted(row) for row in rows], IGNORED, "right")}
        case _:
            return {"labels": _padded([_learnt(row) for row in rows], IGNORED, "right")}


def _first(tokenizer: PreTrainedTokenizerBase, row: TokenRow) -> int:
    """The position that says "no answer": of the class token, or the first."""
    token = tokenizer.cls_token_id
    return row.ids.index(token) if token in row.ids else 0


def loss_items(batch: Mapping[str, Tensor], *, shifted: bool) -> int:
    """Return what the loss of a batch is the mean of: tokens to be said, numbers of several labels, else rows.

    Args:
        batch: As the model takes it.
        shifted: Whether a label is compared with what is said before it, so that the first of a row is not.
    """
    labels = batch.get("labels")
    if labels is None or labels.dim() < 2:
        return len(batch["input_ids"] if "input_ids" in batch else next(iter(batch.values())))
    if labels.is_floating_point():
        return labels.numel()
    said = labels[:, 1:] if shifted else labels
    return int((said != IGNORED).sum())


def _whole(row: TokenRow) -> int:
    label = row.example.label
    if not isinstance(label, int) or isinstance(label, bool):
        raise TaskError(
            f"{row.example.title} has the label {label!r}, which is no index of a class."
        )
    return label


def _number(row: TokenRow) -> float:
    label = row.example.label
    if label is None:
        raise TaskError(
            f"{row.example.title} has no label to learn: give it a number, or leave it out."
        )
    return float(label)


def _wanted(row: TokenRow) -> list[int]:
    if not row.target:
        raise TaskError(
            f"{row.example.title} has no answer to learn: give it one, or leave it out."
        )
    return row.target


def _padding(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.pad_token_id is None:
        raise TaskError("The tokenizer has no padding token: set tokenizer.pad_token first.")
    return int(tokenizer.pad_token_id)


def _padded(rows: Sequence[Sequence[int]], fill: int, side: str) -> Tensor:
    longest = max(len(row) for row in rows)
    gaps = [[fill] * (longest - len(row)) for row in rows]
    pairs = zip(rows, gaps, strict=True)
    return torch.tensor([[*gap, *row] if side == "left" else [*row, *gap] for row, gap in pairs])


def shuffled(count: int, size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Yield row numbers in batches of `size`, pass after pass, each pass in a new order."""
    while True:
        order = torch.randperm(count, generator=generator)
        for start in range(0, count, size):
            yield order[start : start + size].tolist()
