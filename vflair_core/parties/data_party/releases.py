"""How much of each example has crossed, counted where it crosses: what a guarantee is stated for."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from attrs import define, field, frozen
from torch import Tensor
from transformers.cache_utils import Cache

from vflair_core.parties.data_party.inputs import cache_in
from vflair_core.tasks.collation import Owner, Owners, digests_of, owners_of


@frozen
class Releases:
    """What crossed of an example: rows of smashed data, the messages they came in, messages of its gradient.

    A tensor with R rows of an example is R rows in one message. Padding is counted: it has read the text.
    """

    rows: int = 0
    messages: int = 0
    gradients: int = 0

    def or_more(self, other: Releases) -> Releases:
        """The larger of each number."""
        return Releases(*map(max, attrs.astuple(self), attrs.astuple(other)))

    def __add__(self, other: Releases) -> Releases:
        return Releases(
            self.rows + other.rows,
            self.messages + other.messages,
            self.gradients + other.gradients,
        )


class _Now(threading.local):
    """What holds in this thread alone."""

    owners: Owners = ()  # whose rows `generate` was given
    public: bool = False  # what crosses now is public text


@define(eq=False)
class ReleaseCounts:
    """Counts, for every example by its identity; defended exchanges only."""

    each: dict[bytes, Releases] = field(factory=dict)
    _now: _Now = field(factory=_Now)

    def owners_of(self, inputs: Mapping[str, Any]) -> Owners:
        """Whose each row of a call is: by the mark of its batch, of what is being generated, of its cache, or by its tokens."""
        said = owners_of(inputs.get("input_ids")) or self._now.owners
        said = said or getattr(cache_in(inputs), "vflair_owners", ())
        return said or tuple((Owner(known),) for known in digests_of(inputs))

    @contextmanager
    def generating(self, inputs: Mapping[str, Any]) -> Iterator[None]:
        """While this lasts, what crosses is of the rows that `generate` was given."""
        before, self._now.owners = self._now.owners, self.owners_of(inputs)
        try:
            yield
        finally:
            self._now.owners = before

    @contextmanager
    def of_public_text(self) -> Iterator[None]:
        """While this lasts, what crosses is nobody's."""
        before, self._now.public = self._now.public, True
        try:
            yield
        finally:
            self._now.public = before

    @property
    def public(self) -> bool:
        """Whether what this thread calls the model with now is public text."""
        return self._now.public

    def sent(self, owners: Owners, smashed: Sequence[Tensor]) -> None:
        """Count an exchange: `owners` has whose each row of the batch is."""
        for row in owners:
            for owner in row:
                rows = sum(_rows(tensor, len(owners), owner.positions) for tensor in smashed)
                self._add(owner, Releases(rows, len(smashed)))

    def gradient(self, owners: Owners) -> None:
        """Count a gradient that is sent."""
        for owner in (owner for row in owners for owner in row):
            self._add(owner, Releases(gradients=1))

    @property
    def most(self) -> Releases:
        """The most that crossed of any example; its numbers may be of different ones."""
        each = list(self.each.values()) or [Releases()]
        columns = zip(*map(attrs.astuple, each), strict=True)
        return Releases(*map(max, columns))

    def state(self) -> dict[str, Tensor]:
        """As tensors, for a run that goes on later."""
        if not self.each:
            return {}
        keys = torch.frombuffer(bytearray(b"".join(self.each)), dtype=torch.uint8)
        counts = torch.tensor([attrs.astuple(count) for count in self.each.values()])
        return {"keys": keys.view(len(self.each), -1), "counts": counts}

    def load_state(self, state: dict[str, Tensor], *, again: bool = False) -> None:
        """Take what `state` returned, beside what is counted here; `again`, if that has it already."""
        if not state:
            return
        for key, counts in zip(state["keys"].tolist(), state["counts"].tolist(), strict=True):
            here, there = self.each.get(bytes(key), Releases()), Releases(*counts)
            self.each[bytes(key)] = here.or_more(there) if again else here + there

    def _add(self, owner: Owner, releases: Releases) -> None:
        self.each[owner.identity] = self.each.get(owner.identity, Releases()) + releases


def remember_owners(cache: Cache, owners: Owners) -> None:
    """Note whose text a cache holds: what is fed to it later is theirs too."""
    if not getattr(cache, "vflair_owners", ()):
        cache.vflair_owners = owners  # type: ignore[attr-defined]


def _rows(tensor: Tensor, batch: int, positions: int | None) -> int:
    """Rows of one row of the batch in a tensor, wherever its batch dimension is."""
    each = -(-tensor.numel() // (max(tensor.shape[-1], 1) * batch))
    return each if positions is None else min(each, positions)
