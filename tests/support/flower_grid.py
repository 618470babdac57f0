"""Flower's grid without Flower's processes: each message is answered at once, as a SuperNode would let it be."""

from __future__ import annotations

from types import SimpleNamespace

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid

from vflair_flower.data_party_app import data_party_app

RUN = 7


class ThisProcess(Grid):
    """Two or more nodes in this process. `sent` holds what the model party's app sent, `came` what was answered.

    Args:
        run: The run config.
        nodes: The node config of each, by its name.
        app: Makes the app that answers.
    """

    def __init__(self, run, nodes, app=data_party_app):
        self.config, self.configs, self.app = dict(run), dict(nodes), app
        self.names = dict(enumerate(nodes, 1))
        self.sent, self.came, self.dead = [], [], set()
        self._replies = {}

    def get_nodes(self):
        return [SimpleNamespace(node_id=n, name=name) for n, name in self.names.items()]

    def get_node_ids(self):
        return list(self.names)

    def push_messages(self, messages):
        numbers = {}
        for message in sorted(messages, key=lambda one: one.metadata.dst_node_id):
            # Strategies draw the order of nodes, and in turns it counts.
            number = f"message-{len(self.sent)}"
            message.metadata.__dict__["_message_id"] = number
            self.sent.append(message)
            self._replies[number] = self._answer(message)
            numbers[id(message)] = number
        return [numbers[id(message)] for message in messages]

    def pull_messages(self, message_ids):
        there = [self._replies.pop(n) for n in message_ids if self._replies.get(n) is not None]
        self.came += there
        return there

    def _answer(self, message):
        name = self.names[message.metadata.dst_node_id]
        if name in self.dead:  # it never answers
            return None
        context = Context(
            RUN, message.metadata.dst_node_id, self.configs[name], RecordDict(), self.config
        )
        try:
            return self.app()(message, context)
        except Exception as error:  # noqa: BLE001 - as Flower's own process for an app does
            return Message(Error(2, f"{type(error)}:<'{error}'>"), reply_to=message)

    def set_run(self, run):
        raise NotImplementedError

    @property
    def run(self):
        raise NotImplementedError

    def create_message(self, *args, **options):
        raise NotImplementedError

    def send_and_receive(self, messages, *, timeout=None):
        raise NotImplementedError
