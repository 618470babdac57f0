"""What an attacker sees of the victims by itself: the messages of a pass, one row of each for one victim."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from attrs import define, field, frozen
from torch import Tensor

from vflair_core.communication.transcript import Record, Transcript
from vflair_core.tasks.token_rows import TokenRow


@frozen
class VictimRow:
    """Where a victim is in the messages that it crossed in.

    Attributes:
        row: Its row.
        padding: Positions at the end of that row that are not its own.
        share: How much of the loss of the batch is its own, in (0, 1].
    """

    row: int = 0
    padding: int = 0
    share: float = 1.0


@define
class Observables(Mapping[str, Any]):
    """The observables of a transcript in which each victim crossed in exchanges of its own, once per release.

    `records` are those of one pass over the N `victims`, `releases` times over, and `spots` has where they are in
    their messages, in the same order; without, each crossed alone. A model with two stacks crosses once in each: what
    is named here is of the first, which reads the text, except for `logits`, which come of the last; all of it is in
    `rounds`.
    """

    records: list[Record]
    releases: int = 1
    is_ht: bool = False
    victims: int = 0  # 0 counts them: one exchange each
    spots: Sequence[VictimRow] = ()

    def __iter__(self) -> Any:
        return iter(self._names())

    def __len__(self) -> int:
        return len(self._names())

    def __getitem__(self, name: str) -> Any:
        if name not in self._names():
            raise KeyError(name)
        match name:
            case "rounds":
                return self.records
            case "lengths":
                return torch.tensor(
                    [len(rows) for rows in self.of_each("smashed")[: self._count()]]
                )
            case "mask":
                lengths = self["lengths"]
                return torch.arange(int(lengths.max()))[None] < lengths[:, None]
            case "releases":
                stacked = _pad(self.of_each("smashed"))
                return stacked.unflatten(0, (self.releases, self._count()))
            case "share":
                return torch.tensor([self._spot(n).share for n in range(self._count())])
            case "logits":
                return _pad(self.of_each("returned", stage=-1)[: self._count()])
            case _:
                return _pad(self.of_each(name)[: self._count()])

    def _names(self) -> list[str]:
        names = ["smashed", "returned", "rounds", "lengths", "mask", "releases"]
        gradients = [role for role in ("hidden_grad", "smashed_grad") if self.of_each(role)]
        names += [*gradients, "share"] if gradients else []
        return [*names, "logits"] if self.is_ht else names

    def of_each(self, role: str, stage: int = 0) -> list[Tensor]:
        """What crossed for each victim, release after release; nothing if the role did not cross."""
        stacks = self.stacks()
        number = stage % (max(stacks.values(), default=0) + 1)
        wanted = [exchange for exchange, stack in stacks.items() if stack == number]
        of_stage = set(wanted)
        chosen: dict[int, Tensor] = {}
        for record in self.records:  # the first tensor of a role in an exchange: the hidden states
            if record.role == role and record.exchange in of_stage:
                chosen.setdefault(record.exchange, record.tensor)
        return [
            _own(chosen[exchange], self._spot(number))
            for number, exchange in enumerate(wanted)
            if exchange in chosen
        ]

    def stacks(self) -> dict[int, int]:
        """Which stack of the model each exchange is of, in their order, from 0."""
        exchanges = dict.fromkeys(record.exchange for record in self.records)
        each = self.victims * self.releases
        stacks = max(len(exchanges) // each, 1) if each else 1
        return {exchange: number % stacks for number, exchange in enumerate(exchanges)}

    def _spot(self, number: int) -> VictimRow:
        return self.spots[number] if self.spots else VictimRow()

    def _count(self) -> int:
        return self.victims or len(self.of_each("smashed")) // self.releases


def _own(batch: Tensor, spot: VictimRow) -> Tensor:
    """The victim's row of a tensor (B, …), without padding if it has positions, (B, T, …)."""
    row = batch[spot.row]
    return row[: len(row) - spot.padding] if row.dim() > 1 else row


def _pad(rows: list[Tensor]) -> Tensor:
    if rows[0].dim() < 2:
        return torch.stack(rows)
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


@frozen(eq=False)
class Capture:
    """What crossed of the victims, and the row of each as it was sent (the first time).

    `spots` has where each is in its messages, release after release. `updates` are the gradients of the data party's
    weights, by name, for each victim or each batch of victims.
    """

    transcript: Transcript
    rows: list[TokenRow]
    spots: list[VictimRow]
    updates: list[dict[str, Tensor]] = field(factory=list)
