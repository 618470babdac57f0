"""Flower's grid with the nodes of one run: hands over where the model party is, takes note, and lets go of who is lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from attrs import define, field, frozen
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from vflair_core import ExperimentError
from vflair_flower.handover import KEY, Handover
from vflair_flower.served_half import ServedHalf

PAUSE = 0.5  # seconds between two looks for replies


@frozen
class Lost:
    """A node that a run went on without, the stage of the run, and why."""

    node: str
    stage: str
    why: str


@frozen
class Reply:
    """What a node answered at a stage of the run."""

    node: str
    stage: str
    content: RecordDict


@define(eq=False)
class PartyGrid(Grid):
    """The nodes of one run, as any strategy of Flower sees them.

    Each message gets the handover of its node. Replies are taken as they come: a node that answers with an error, or not at
    all, is let go at once, so that the others do not wait for it at the model party.

    Args:
        grid: Flower's.
        half: The model party.
        nodes: Those of the run, with their names.
        tell: Told, in a sentence, of each node that begins or is lost.
    """

    grid: Grid
    half: ServedHalf
    nodes: dict[int, str]
    tell: Callable[[str], None]
    lost: list[Lost] = field(factory=list)
    replies: list[Reply] = field(factory=list)
    _handovers: dict[int, Handover] = field(factory=dict)
    _begun: set[tuple[int, str]] = field(factory=set)

    def get_node_ids(self) -> Iterable[int]:
        """The nodes that are left.

        Raises:
            ExperimentError: None is.
        """
        if not self.nodes:
            whole = "; ".join(f"{each.node} ({each.stage}): {each.why}" for each in self.lost)
            raise ExperimentError(f"No node is left in this run. Lost were: {whole}")
        return list(self.nodes)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages to nodes of the run, and return their replies, errors among them."""
        sent = [self._handed_over(message) for message in messages]
        if not sent:
            return []
        ids = list(self.grid.push_messages(sent))
        waiting: dict[str, Message] = {}
        for number, message in zip(ids, sent, strict=True):
            if number:
                waiting[number] = message
            else:
                self._lose(message, "Flower did not take the message")
        began = time.monotonic()
        replies: list[Message] = []
        while waiting:
            for reply in self.grid.pull_messages(list(waiting)):
                self._note(waiting.pop(reply.metadata.reply_to_message_id), reply)
                replies.append(reply)
            for number, message in list(waiting.items()):
                if why := self._gone(message, began, timeout):
                    del waiting[number]
                    self._lose(message, why)
            if waiting:
                time.sleep(PAUSE)
        return replies

    def _gone(self, asked: Message, began: float, timeout: float | None) -> str | None:
        """Why a node is not waited for any longer, if it is not."""
        node, stage = asked.metadata.dst_node_id, stage_of(asked)
        silent = self.half.silent(node, began)
        if silent is not None and (node, stage) not in self._begun:
            self._begun.add((node, stage))
            self.tell(f"Node {self.nodes[node]} has begun ({stage}).")
        if silent is not None and silent > self.half.options.node_timeout:
            return f"silent for {silent:.0f} seconds in the middle of its work (node-timeout)"
        if timeout is not None and time.monotonic() - began > timeout:
            return f"no reply within {timeout:g} seconds"
        return None

    def _handed_over(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        if node not in self._handovers:
            self._handovers[node] = self.half.admit(node)
        # A strategy gives all its messages one content.
        message.content = RecordDict({**message.content, KEY: self._handovers[node].record()})
        return message

    def _note(self, asked: Message, reply: Message) -> None:
        if reply.has_error():
            self._lose(asked, reply.error.reason or f"Flower's error {reply.error.code}")
            return
        name = self.nodes[asked.metadata.dst_node_id]
        self.replies.append(Reply(name, stage_of(asked), reply.content))

    def _lose(self, asked: Message, why: str) -> None:
        """Go on without a node: its token counts no more, and nobody waits for it at the model party."""
        node, stage = asked.metadata.dst_node_id, stage_of(asked)
        name = self.nodes.pop(node)
        self.half.let_go(node)
        self.lost.append(Lost(name, stage, why))
        self.tell(f"Node {name} is lost ({stage}): {why}. The run goes on without it.")

    def set_run(self, run: Any) -> None:
        """As Flower's grid."""
        self.grid.set_run(run)

    @property
    def run(self) -> Any:
        """As Flower's grid."""
        return self.grid.run

    def create_message(self, *args: Any, **options: Any) -> Message:
        """As Flower's grid."""
        return self.grid.create_message(*args, **options)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """As Flower's grid, with handovers."""
        return self.grid.push_messages([self._handed_over(message) for message in messages])

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """As Flower's grid."""
        return self.grid.pull_messages(message_ids)


def stage_of(message: Message) -> str:
    """The stage of the run that a message belongs to: join, round 1, round 2, …, finish."""
    kind, _, action = message.metadata.message_type.partition(".")
    if kind != "train":
        return action or kind
    config: Any = message.content.get("config", {})
    return f"round {dict(config).get('server-round', '?')}"
