"""The data party's end of a session: it numbers messages, and says in the next one what is no longer needed."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from vflair_core.communication.channel import Channel
from vflair_core.communication.journal import Journal
from vflair_core.communication.locks import Lock
from vflair_core.communication.message import Crossing, Kind, Message, Phase
from vflair_core.communication.program import Program
from vflair_core.communication.replies import check_reply
from vflair_core.errors import BusyError, ChannelError, SessionLostError, VflairError
from vflair_core.events import events

MAX_PROGRAMS = (
    512  # that the model party should know at a time; it may refuse more (`Caps.programs`)
)
FIRST_PAUSE, LONGEST_PAUSE = 0.005, 0.25  # seconds before a busy model party is asked again


class Connection:
    """One session with the model party. `step` counts optimizer steps and travels in every message."""

    def __init__(self, channel: Channel, fingerprint: str) -> None:
        self.channel, self.fingerprint = channel, fingerprint
        self.session = uuid.uuid4().hex
        self.step = 0
        self.graphs: list[int] = []  # forwards whose backward will not come
        self.caches: list[str] = []  # caches that are gone
        self.copies: list[tuple[str, str]] = []  # caches that were copied: (old, new)
        self.answered = 0  # messages that were not refused, whatever was answered
        self._registered: dict[
            str, None
        ] = {}  # programs that the model party knows, the last used last
        self._forgotten: list[str] = []  # programs that it need not know any more
        self._seq = 0  # of the message that was answered last
        self._abandoned: int | None = None  # the first exchange of a step that broke off
        self._opened: tuple[Any, ...] | None = (
            None  # with what a session was that only asks, and may be opened again
        )
        self._journal = Journal()
        self._unknown: Message | None = (
            None  # the last message, while it is not known whether it was carried out
        )
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
        self._abandoned = None
        meta: dict[str, Any] = {"fingerprint": self.fingerprint, "counterparts": list(counterparts)}
        meta["nonce"] = uuid.uuid4().hex  # so that an old one that comes late opens nothing
        alone = self.channel.lasting and optimizer is None and resume is None and self.step == 0
        self._opened = (counterparts, weights) if alone else None
        self._journal = Journal()
        self._unknown = None
        if optimizer is not None:
            meta["optimizer"] = dict(optimizer)
        if resume is not None:
            meta["resume"] = list(resume)
        reply = self.request("open", weights, meta)
        self.session = reply.session  # a server on another machine gives it a name of its own
        return reply.meta

    def commit(
        self,
        *,
        scale: float | None,
        rate: float,
        skip: bool,
        groups: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """Let the model party take or skip its step; either way both parties count it.

        Args:
            scale: What gradients are multiplied with; None leaves them.
            rate: Learning rate of all groups of the optimizer.
            skip: Take no step.
            groups: Options of each group instead, learning rates among them, as they are from this step on.
        """
        meta = {"scale": scale, "lr": rate, "skip": skip, "groups": groups}
        self.request("commit", (), {k: v for k, v in meta.items() if v is not None or k == "scale"})
        self.step += 1

    def facts(self) -> Mapping[str, Any]:
        """Ask what the model party trains (``trainable``, names) and whether it keeps checkpoints (``keeps``)."""
        return self.request("facts").meta

    def close(self) -> None:
        """End the session: the model party forgets it, with its graphs, caches and gradients."""
        self.request("close")

    @property
    def seq(self) -> int:
        """The number of the message that was answered last."""
        return self._seq

    def move(self, session: str, seq: int, step: int) -> None:
        """Speak in another session of the same data party from here on: message `seq` was answered there last, at `step`."""
        self._registered.clear()
        self._forgotten.clear()
        self._abandoned = self._opened = self._unknown = None
        self.session, self._seq, self.step = session, seq, step

    def close_other(self, session: str, seq: int) -> None:
        """End a session that this connection had before; the last message that was answered in it had the number `seq`."""
        present = self.session, self._seq
        self.session, self._seq = session, seq
        try:
            self.close()
        finally:
            self.session, self._seq = present

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
        """Send one message of this session and return the reply.

        Raises:
            ProtocolError: The model party refuses it, and nothing has changed there.
            ChannelError: It is not known whether the model party got it; it may be sent again as it was.
        """
        with self._lock:
            if self._abandoned is not None and kind not in ("open", "close"):
                self._request("release", (), {"abandoned": self._abandoned}, 0, "control")
                self._abandoned = None
            return self._request(kind, crossings, meta, exchange, phase)

    def abandon(self, first: int = 0) -> None:
        """Let the model party forget, before the next message, what this step has left there so far: its gradients.

        `first` is the number of the step's first exchange: from there on no backward comes either.
        """
        self._abandoned = first if self._abandoned is None else min(first, self._abandoned)

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
        news: dict[str, Any] = {
            "released_graphs": graphs,
            "released_caches": [key for key in gone if key not in never],
            "copied_caches": [pair for pair in copies if pair[1] not in never],
            "released_programs": forgotten,
        }
        news = {key: value for key, value in news.items() if value}
        try:
            self._settle(kind)
            message = self._message(kind, crossings, {**meta, **news}, exchange, phase)
            reply = self._asked(message)
        except SessionLostError:
            if (
                kind != "forward"
                or self._opened is None
                or not self._journal.can_fill(meta["cache"])
            ):
                raise
            self._journal.follow(news.get("copied_caches", ()), news.get("released_caches", ()))
            spelt = self._journal.spelt_out(meta)
            message, reply = self._taken_up(kind, crossings, spelt, exchange, phase)
        self.answered += 1
        self._seq += 1  # only now: a refused message did nothing, and its number is free
        check_reply(message, reply)
        if self._opened is not None:
            self._journal.note(message)
        # What was added meanwhile stays for the next message.
        del self.graphs[: len(graphs)], self.caches[: len(gone)]
        del self.copies[: len(copies)], self._forgotten[: len(forgotten)]
        if "program" in meta:
            self._register(meta["id"])
        return reply

    def _asked(self, message: Message) -> Message:
        """Send a message, again and again where the model party is busy, and keep it while its fate is not known."""
        until, pause = time.monotonic() + self.channel.patience, FIRST_PAUSE
        while True:
            self._unknown = message if self.channel.lasting else None
            try:
                reply = self.channel.request(message)
            except BusyError:
                self._unknown = None
                if time.monotonic() + pause > until:
                    raise
            except ChannelError:
                raise
            except VflairError:  # it was refused
                self._unknown = None
                raise
            else:
                self._unknown = None
                return reply
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _settle(self, kind: Kind) -> None:
        """Learn what became of a message whose reply did not come, by sending it again: it is carried out once.

        A step is not sent again, for the data party did not take it. If the model party has, the next message is refused.
        """
        lost = self._unknown
        if lost is None:
            return
        if kind in ("open", "close") or lost.kind == "commit":
            self._unknown = None
            return
        if self._opened is not None and kind == "forward":
            self._unknown = None
            raise SessionLostError("A reply was lost.")  # a session that only asks is opened anew
        try:
            self._asked(lost)
        except (ChannelError, SessionLostError):
            raise
        except VflairError:
            return  # it was refused, and did nothing
        self._seq += 1
        if lost.kind == "forward":
            self.graphs.append(lost.exchange)
            if lost.meta["cache"] is not None:
                self.caches.append(lost.meta["cache"]["id"])

    def _message(
        self,
        kind: Kind,
        crossings: Sequence[Crossing],
        meta: Mapping[str, Any],
        exchange: int,
        phase: Phase,
    ) -> Message:
        numbers = (self.step, exchange, self._seq + 1, phase)
        return Message(kind, self.session, *numbers, tuple(crossings), meta)

    def _taken_up(self, *sent: Any) -> tuple[Message, Message]:
        """Send a forward to a model party that was started anew; return it as it was sent, and the reply."""
        until = time.monotonic() + self.channel.patience
        while True:
            try:
                self._open_again()
                message = self._message(*sent)
                return message, self._asked(message)
            except SessionLostError:  # it was started anew once more
                if time.monotonic() > until:
                    raise

    def _open_again(self) -> None:
        """Open the session that only asks anew, and fill its caches again."""
        assert self._opened is not None
        journal = self._journal
        events(__name__).warning("session_lost", session=self.session, caches="filled again")
        try:
            self.open(*self._opened)
        finally:
            self._journal = journal
        for entry in journal.entries():
            message = self._message("forward", *entry.sent)
            check_reply(message, self.channel.request(message))
            self._seq += 1
            self._register(entry.meta["id"])

    def _register(self, program: str) -> None:
        """Note that the model party knows a program; it may forget the one that was not used for longest."""
        self._registered[program] = None
        if len(self._registered) > MAX_PROGRAMS:
            oldest = next(iter(self._registered))
            del self._registered[oldest]
            self._forgotten.append(oldest)
