"""What filled the caches of a session, kept to fill them again at a model party that was started anew.

What is sent again is what was sent, bit for bit: a defense that drew noise for it draws none again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import attrs
from attrs import define, field, frozen
from torch import Tensor

from vflair_core.communication.message import Crossing, Message, Phase


@frozen(eq=False)
class Entry:
    """A forward that filled a cache."""

    crossings: tuple[Crossing, ...]
    meta: Mapping[str, Any]  # with its program spelt out
    exchange: int
    phase: Phase

    @property
    def sent(self) -> tuple[Any, ...]:
        """What its message is made of, besides its numbers."""
        return self.crossings, self.meta, self.exchange, self.phase

    def filling(self, cache: str) -> Entry:
        """The same for a cache of another name, a copy."""
        told = {**self.meta["cache"], "id": cache}
        return attrs.evolve(self, meta={**self.meta, "cache": told})


@define(eq=False)
class Journal:
    """The forwards that filled each cache that is in use."""

    _entries: dict[str, list[Entry]] = field(factory=dict)  # by cache, in their order
    _lost: set[str] = field(factory=set)  # caches that cannot be filled again
    _programs: dict[str, Any] = field(factory=dict)  # as messages spelt them out

    def note(self, message: Message) -> None:
        """Note a message that was answered."""
        meta = message.meta
        self.follow(meta.get("copied_caches", ()), meta.get("released_caches", ()))
        if message.kind != "forward":
            return
        if "program" in meta:
            self._programs[meta["id"]] = meta["program"]
        told = meta.get("cache")
        if told is None:
            return
        if meta["grad"]:  # what it holds is part of a graph
            self._lost.add(told["id"])
            self._entries.pop(told["id"], None)
        if told["id"] not in self._lost:
            spelt = {**meta, "program": self._programs[meta["id"]]}
            for news in (
                "copied_caches",
                "released_caches",
                "released_graphs",
                "released_programs",
            ):
                spelt.pop(news, None)
            kept = tuple(attrs.evolve(c, tensor=_copy(c.tensor)) for c in message.tensors)
            entry = Entry(kept, spelt, message.exchange, message.phase)
            self._entries.setdefault(told["id"], []).append(entry)

    def follow(self, copies: Iterable[tuple[str, str]], gone: Iterable[str]) -> None:
        """Note that caches were copied, (old, new) each, and that others are gone."""
        for old, new in copies:
            if old in self._lost:
                self._lost.add(new)
            elif old in self._entries:
                self._entries[new] = [entry.filling(new) for entry in self._entries[old]]
        for key in gone:
            self._entries.pop(key, None)
            self._lost.discard(key)

    def can_fill(self, told: Mapping[str, Any] | None) -> bool:
        """Whether the cache that a message speaks of, if any, can be filled again."""
        return told is None or told["id"] in self._entries or "parts" in told

    def entries(self) -> list[Entry]:
        """The forwards that fill every cache again, each once for each cache."""
        return [entry for entries in self._entries.values() for entry in entries]

    def spelt_out(self, meta: Mapping[str, Any]) -> dict[str, Any]:
        """The facts of a forward with its program, which a model party that was started anew does not know."""
        return (
            {"program": self._programs[meta["id"]], **meta} if "program" not in meta else {**meta}
        )


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()
