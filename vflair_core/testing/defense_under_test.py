"""A defense under test: parties with it, parties without, and what crosses of both."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen
from torch import Tensor

from vflair_core.communication.transcript import Transcript
from vflair_core.defenses.defense import Defense
from vflair_core.testing.calls import Call, Parties, act, parties_of

if TYPE_CHECKING:
    from vflair_core.parties.data_party.party import DataParty

INSIDE = ("on_embeddings", "on_smashed")  # where what a text becomes can be changed
PLACES = (*INSIDE, "on_gradient")
Make = Callable[[], Defense]


class Watching(Defense):
    """Changes nothing and keeps what passes each place, with the mask of real tokens."""

    def __init__(self) -> None:
        self.seen: dict[str, list[tuple[Tensor, Tensor | None]]] = {place: [] for place in PLACES}

    def on_embeddings(self, embeddings: Tensor, exchange: Any) -> Tensor:
        return self._keep("on_embeddings", embeddings, exchange)

    def on_smashed(self, smashed: Tensor, exchange: Any) -> Tensor:
        return self._keep("on_smashed", smashed, exchange)

    def on_gradient(self, gradient: Tensor, exchange: Any) -> Tensor:
        return self._keep("on_gradient", gradient, exchange)

    def _keep(self, place: str, tensor: Tensor, exchange: Any) -> Tensor:
        self.seen[place].append((tensor.detach().clone(), exchange.mask))
        return tensor

    def at(self, place: str) -> list[Tensor]:
        """All that passed there, in order."""
        return [tensor for tensor, _ in self.seen[place]]


@frozen
class Tried:
    """The defense under test: how it is made, made ready, and on what it is prepared."""

    make: Make
    wake: Callable[[Defense], None]
    public: tuple[str, ...]

    @property
    def name(self) -> str:
        return type(self.make()).__name__

    @property
    def reads(self) -> bool:
        """Whether it changes texts or tokens, so that a model is given texts and not token ids."""
        defense = self.make()
        return any(overrides(defense, place) for place in ("on_text", "on_tokens"))

    def party(self, call: Call, *around: Watching) -> DataParty:
        """A party with the defense, prepared, between others."""
        defense = self.make()
        inner, outer = around or (None, None)
        each = [one for one in (inner, defense, outer) if one is not None]
        party = self._cut(call, each).data_party
        self.wake(defense)
        for watching in around:
            watching.__init__()  # type: ignore[misc]  # it saw the preparation
        return party

    def bare(self, call: Call) -> Bare:
        """Parties of the same model that nothing defends, after the same call."""
        return _bare(call, texts=self.reads)

    def covered(self, call: Call) -> Parties:
        """Parties with the defense, prepared."""
        return self._cut(call, [self.make()])

    def crossing(self, party: DataParty, call: Call) -> tuple[list[Any], list[Any]]:
        """What a call gives, and what was sent in it."""
        return _crossing(party, call, texts=self.reads)

    def _cut(self, call: Call, defenses: Sequence[Defense]) -> Parties:
        return parties_of(call.model, call.head, call.tail, defenses, public=self.public)


@frozen(eq=False)
class Bare:
    """What a call gives and sends where nothing defends, and the parties afterwards."""

    parties: Parties
    given: list[Any]
    sent: list[Any]


@functools.cache
def _bare(call: Call, *, texts: bool) -> Bare:
    parties = parties_of(call.model, call.head, call.tail)
    return Bare(parties, *_crossing(parties.data_party, call, texts=texts))


def _crossing(party: DataParty, call: Call, *, texts: bool) -> tuple[list[Any], list[Any]]:
    with torch.random.fork_rng(), party.channel.tap(Transcript()) as transcript:
        given = act(party, call, texts=texts)
    return given, [record for record in transcript.messages if record.direction == "sent"]


def supported(defense: Defense, call: Call) -> bool:
    """Whether a defense says that it can do a call."""
    return any(
        all(
            "*" in (asked, said) or asked == said
            for asked, said in zip(call.cell, one, strict=True)
        )
        for one in defense.supports
    )


def overrides(defense: Defense, place: str) -> bool:
    """Whether a defense stands at a place."""
    return getattr(type(defense), place) is not getattr(Defense, place)


def sent_as(role: str, records: Sequence[Any]) -> list[Tensor]:
    """What was sent in a role, in order."""
    return [record.tensor for record in records if record.role == role]
