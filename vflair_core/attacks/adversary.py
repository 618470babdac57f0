"""A model party that cheats: it follows the protocol until it answers what it likes."""

from __future__ import annotations

from collections.abc import Callable

import attrs
from torch import Tensor

from vflair_core.communication.channel import Channel, as_it_arrives
from vflair_core.communication.message import Message, to_be_rounded
from vflair_core.communication.replies import Due, check_tensors
from vflair_core.errors import AttackError, ProtocolError

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
        self.wire_dtype = inner.wire_dtype

    @property
    def handled(self) -> float | None:
        """Seconds of the model party behind the adversary."""
        return self.inner.handled

    def deliver(self, message: Message) -> Message:
        honest = self.inner.deliver(message)
        answer = plausible(self.tamper(message, honest), honest)
        if self.wire_dtype == "float32":
            return answer
        return as_it_arrives(to_be_rounded(answer, self.wire_dtype))  # as every reply does


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
    try:
        check_tensors(honest.kind, answer.tensors, [Due.like(c) for c in honest.tensors])
    except ProtocolError as error:
        raise AttackError(
            f"{error} The data party would notice. Keep names, roles, shapes and types."
        ) from error
    numbers = {
        name: getattr(honest, name) for name in ("kind", "session", "step", "exchange", "seq")
    }
    return attrs.evolve(answer, phase=honest.phase, **numbers)
