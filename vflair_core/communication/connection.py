"""The data party's end of a session: it numbers messages, and says in the next one what is no longer needed."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from vflair_core.communication.channel import Channel
from vflair_core.communication.locks import Lock
from vflair_core.communication.message import Crossing, Kind, Message, Phase
from vflair_core.communication.program import Program

MAX_PROGRAMS = (
    512  # that the model party should know at a time; it may refuse more (`Caps.programs`)
)


class Connection:
    """One session with the model party. `step` counts optimizer steps and travels in every message."""

    def __init__(self, channel: Channel, fingerprint: str) -> None:
        self.channel, self.fingerprint = channel, fingerprint
        self.session = uuid.uuid4().hex
        self.step = 0
        self.graphs: list[int] = []  # forwards whose backward will not come
        self.caches: list[str] = []  # caches that are gone
        self.copies: list[tuple[str, str]] = []  # caches that were copied: (old, new)
        self.answered = 0  # messages that were not refused
        self._registered: dict[
            str, None
        ] = {}  # programs that the model party knows, the last used last
        self._forgotten: list[str] = []  # programs that it need not know any more
        self._seq = 0
        self._lock = Lock()  # backward runs in whichever thread called it

    def open(
        self,
        counterparts: Sequence[Mapping[str, Any]] = (),
        weights: Sequence[Crossing] = (),
        optimizer: Mapping[str, Any] | None = None,
        resume: Sequence[int] | None = None,
    ) -> Mapping[str, Any]:
        """Start the session, and return the facts of the reply.

        `counterparts` describe modules that the model party builds for defenses, of `weights` (`counterparts.describe`);
        `optimizer` asks the model party to make one of its allow-list; `resume`, to go back to the last
        of these steps that it has a checkpoint of.
        """
        self._registered.clear()
        self._forgotten.clear()
        meta: dict[str, Any] = {"fingerprint": self.fingerprint, "counterparts": list(counterparts)}
        if optimizer is not None:
            meta["optimizer"] = dict(optimizer)
        if resume is not None:
            meta["resume"] = list(resume)
        return self.request("open", weights, meta).meta

    def commit(
        self,
        *,
        scale: float | None,
        rate: float,
        skip: bool,
        groups: Sequence[Mapping[str, Any]] | None = None,
        sharing: str | None = None,
    ) -> None:
        """Let the model party take or skip its step; either way both parties count it.

        Args:
            scale: What gradients are multiplied with; None leaves them.
            rate: Learning rate of all groups of the optimizer.
            skip: Take no step.
            groups: Options of each group instead, learning rates among them, as they are from this step on.
            sharing: In a chain of model parties, the rule for shared weights that all must have.
        """
        meta = {"scale": scale, "lr": rate, "skip": skip, "groups": groups, "sharing": sharing}
        self.request("commit", (), {k: v for k, v in meta.items() if v is not None or k == "scale"})
        self.step += 1

    def facts(self) -> Mapping[str, Any]:
        """Ask what the model party trains (``trainable``, names) and whether it keeps checkpoints (``keeps``)."""
        return self.request("facts").meta

    def close(self) -> None:
        """End the session: the model party forgets it, with its graphs, caches and gradients."""
        self.request("close")

    def program(self, program: Program) -> dict[str, Any]:
        """Name a program; it is spelt out once per session."""
        named = {"id": program.id}
        if program.id in self._registered:
            self._registered[program.id] = self._registered.pop(program.id)
            return named
        return {**named, "program": program.to_wire()}

    def request(
        self,
        kind: Kind,
        crossings: Sequence[Crossing] = (),
        meta: Mapping[str, Any] = MappingProxyType({}),
        *,
        exchange: int = 0,
        phase: Phase = "control",
    ) -> Message:
        """Send one message of this session and return the reply."""
        with self._lock:
            return self._request(kind, crossings, meta, exchange, phase)

    def _request(
        self,
        kind: Kind,
        crossings: Sequence[Crossing],
        meta: Mapping[str, Any],
        exchange: int,
        phase: Phase,
    ) -> Message:
        graphs, gone, copies = self.graphs[:], self.caches[:], self.copies[:]
        forgotten = self._forgotten[:]
        never = {new for _, new in copies} & set(gone)  # copied and dropped between two messages
        news = {
            "released_graphs": graphs,
            "released_caches": [key for key in gone if key not in never],
            "copied_caches": [pair for pair in copies if pair[1] not in never],
            "released_programs": forgotten,
        }
        self._seq += 1
        reply = self.channel.request(
            Message(
                kind,
                self.session,
                self.step,
                exchange,
                self._seq,
                phase,
                tuple(crossings),
                {**meta, **{key: value for key, value in news.items() if value}},
            )
        )
        self.answered += 1
        # Only now: a refused message released nothing. What was added meanwhile stays for the next one.
        del self.graphs[: len(graphs)], self.caches[: len(gone)]
        del self.copies[: len(copies)], self._forgotten[: len(forgotten)]
        if "program" in meta:
            self._register(meta["id"])
        return reply

    def _register(self, program: str) -> None:
        """Note that the model party knows a program; it may forget the one that was not used for longest."""
        self._registered[program] = None
        if len(self._registered) > MAX_PROGRAMS:
            oldest = next(iter(self._registered))
            del self._registered[oldest]
            self._forgotten.append(oldest)
