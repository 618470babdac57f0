"""A model party that cheats: it follows the protocol until it answers what it likes."""

from __future__ import annotations

from collections.abc import Callable

import attrs
from torch import Tensor

from vflair_core.communication.channel import Channel
from vflair_core.communication.message import Message
from vflair_core.errors import AttackError

Tamper = Callable[[Message, Message], Message]


class Adversary:
    """An active attacker in the place of the model party: an attack makes one in its method `adversary`.

    That method's parameters name what the attacker knows before anything crosses (`BEFORE` in `knowledge.py`). What the
    adversary kept of the run is given to the attack itself, which guesses when all is over, as `adversary_state`.
    """

    def tamper(self, request: Message, reply: Message) -> Message:
        """Return what the data party gets instead of the honest `reply` to its `request`.

        The tensors' names, roles, shapes and types must stay: anything else would give the adversary away.
        """
        return reply

    def state(self) -> dict[str, Tensor]:
        """Return what it learned, for the attack that made it."""
        return {}


class Tampered(Channel):
    """A channel at whose far end an adversary has the last word."""

    def __init__(self, inner: Channel, tamper: Tamper) -> None:
        super().__init__()
        self.inner, self.tamper = inner, tamper

    def deliver(self, message: Message) -> Message:
        honest = self.inner.deliver(message)
        return plausible(self.tamper(message, honest), honest)


def honestly(request: Message, reply: Message) -> Message:  # noqa: ARG001 - a `Tamper` that does nothing
    """Leave the reply as it is."""
    return reply


def plausible(answer: Message, honest: Message) -> Message:
    """Return `answer` as the reply to the request that `honest` replies to.

    Raises:
        AttackError: Its tensors are not of the names, roles, shapes and types that the data party expects.
    """
    if not isinstance(answer, Message):
        raise AttackError(f"An adversary answered with a {type(answer).__name__}, not a Message.")
    for here, there in zip(_outside(answer), _outside(honest), strict=False):
        if here != there:
            raise AttackError(
                f"An adversary answered a {honest.kind} with {here} where {there} was due: the data party would "
                "notice. Keep names, roles, shapes and types."
            )
    if len(answer.tensors) != len(honest.tensors):
        raise AttackError(
            f"An adversary answered a {honest.kind} with {len(answer.tensors)} tensors where "
            f"{len(honest.tensors)} were due: the data party would notice."
        )
    numbers = {
        name: getattr(honest, name) for name in ("kind", "session", "step", "exchange", "seq")
    }
    return attrs.evolve(answer, phase=honest.phase, **numbers)


def _outside(message: Message) -> list[str]:
    """What can be seen of each tensor without looking into it."""
    return [f"{c.role} {c.name} {tuple(c.tensor.shape)} {c.tensor.dtype}" for c in message.tensors]
