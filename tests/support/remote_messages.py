"""Messages for servers whose `handle` is no model."""

from __future__ import annotations

import torch

from vflair_core.communication.message import Crossing, Message, reply


def doubled(message):
    """A `handle` that gives back twice what it gets."""
    tensors = (Crossing("returned", "returned", c.tensor * 2) for c in message.tensors)
    return reply(message, tuple(tensors), {"step": message.step})


class Talk:
    """The data party's end of a session, without a model: it numbers messages."""

    def __init__(self, channel, asked="asked"):
        self.channel, self.session, self.seq = channel, asked, 0

    def say(self, kind, *tensors, **meta):
        crossings = tuple(Crossing("x", "smashed", tensor) for tensor in tensors)
        message = Message(kind, self.session, 0, 0, self.seq + 1, tensors=crossings, meta=meta)
        answer = self.channel.request(message)
        self.seq += 1
        if kind == "open":
            self.session = answer.session
        return answer

    def double(self, numbers):
        """Send numbers and see that twice as much comes back."""
        (answer,) = self.say("forward", numbers).tensors
        assert torch.equal(answer.tensor, numbers * 2)
