"""A message that the server sends back as it came: it costs both sides the way and nothing else, so the way can be measured."""

from __future__ import annotations

import statistics
import time

import torch

from vflair_core.communication.channel import Channel
from vflair_core.communication.message import Crossing, Message, reply

PROBE = "probe"  # no session that is issued has this name
ROWS, WIDTH = 1024, 1024  # 4 MiB in float32


def is_probe(message: Message) -> bool:
    """Whether a message asks for nothing but to be sent back."""
    return message.kind == "release" and message.session == PROBE


def echo(message: Message) -> Message:
    """The answer to a probe."""
    return reply(message, tuple(Crossing(c.name, "returned", c.tensor) for c in message.tensors))


def round_trip(channel: Channel, rounds: int) -> tuple[float, float]:
    """Seconds there and back of a message with nothing in it: the median, and the slowest.

    Raises:
        ChannelError: The way was lost.
    """
    _there_and_back(channel, 1)  # what is only slow once
    seconds = [_there_and_back(channel, 2 + n) for n in range(rounds)]
    return statistics.median(seconds), max(seconds)


def load(channel: Channel) -> tuple[int, float]:
    """Bytes of some hidden states before they are rounded, and the seconds that they take there and back.

    Raises:
        ChannelError: The way was lost.
    """
    states = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
    crossing = Crossing("probe", "smashed", states)
    return states.nbytes, min(_there_and_back(channel, 1 + n, crossing) for n in range(3))


def _there_and_back(channel: Channel, seq: int, *tensors: Crossing) -> float:
    start = time.perf_counter()
    channel.request(Message("release", PROBE, 0, 0, seq, tensors=tensors))
    return time.perf_counter() - start
