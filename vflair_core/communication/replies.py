"""What a reply must be, checked by the data party as strictly as the model party checks what it is asked.

`check_reply` sees what can be seen of one message and its reply; `check_tensors` compares what came with what was due,
where the data party knows it: the answer of a program, and the gradients of what was sent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from vflair_core.communication.codec import MAX_SESSION
from vflair_core.communication.message import Crossing, Message, Role
from vflair_core.errors import ProtocolError, shown


def check_reply(message: Message, reply: Message) -> None:
    """See that `reply` answers `message`: its kind and numbers, and of its tensors and facts what its kind demands.

    Raises:
        ProtocolError: It does not; the text says what came and what was due.
    """
    for name in ("kind", "step", "exchange", "seq", "phase"):
        came, due = getattr(reply, name), getattr(message, name)
        if type(came) is not type(due) or came != due:
            raise _lie(message, f"{name} {shown(came)}", f"{name} {shown(due)}")
    _check_session(message, reply)
    if not isinstance(reply.meta, Mapping):
        raise _lie(message, f"facts that are {shown(reply.meta)}", "a map of facts")
    role = _ROLES.get(message.kind)
    for number, crossing in enumerate(reply.tensors):
        if role is None or (crossing.role, crossing.name) != (role, role):
            came = f"tensor {number} as {shown(crossing.role)} {shown(crossing.name)}"
            raise _lie(message, came, f"{role} {role}" if role else "no tensor")
    if check := _CHECKS.get(message.kind):
        check(message, reply)


def _check_session(message: Message, reply: Message) -> None:
    if message.kind != "open" and reply.session != message.session:
        raise _lie(message, f"session {shown(reply.session)}", f"session {shown(message.session)}")
    # Whoever serves many issues the names of sessions when they are opened.
    if not isinstance(reply.session, str) or not 0 < len(reply.session) <= MAX_SESSION:
        raise _lie(message, f"session {shown(reply.session)}", "the name of a session")


def _check_open(message: Message, reply: Message) -> None:
    step, moved = _fact(message, reply, "step"), _fact(message, reply, "moved")
    possible = message.meta.get("resume", [message.step])
    if type(step) is not int or step not in possible:
        raise _lie(message, f"step {shown(step)}", f"one of the steps {shown(list(possible))}")
    if type(moved) is not int or moved < 0:
        raise _lie(message, f"moved {shown(moved)}", "a number of steps >= 0")


def _check_forward(message: Message, reply: Message) -> None:
    live, count = _fact(message, reply, "live"), len(reply.tensors)
    if not _is_list(live, bool) or len(live) != count:
        raise _lie(message, f"live {shown(live)}", f"true or false for each of {count} tensors")
    for number, (alive, crossing) in enumerate(zip(live, reply.tensors, strict=True)):
        dtype = crossing.tensor.dtype
        if alive and not (
            message.meta.get("grad") and (dtype.is_floating_point or dtype.is_complex)
        ):
            raise _lie(message, f"tensor {number} ({dtype}) with a gradient", "none with one")
    if message.meta.get("grad") and message.meta.get("wants") and not any(live):
        wants = len(message.meta["wants"])
        raise _lie(message, "nothing a gradient goes back through", f"some, for {wants} tensors")


def _check_facts(message: Message, reply: Message) -> None:
    _check_names(message, reply, "trainable")
    if type(keeps := _fact(message, reply, "keeps")) is not bool:
        raise _lie(message, f"keeps {shown(keeps)}", "true or false")


def _check_norms(message: Message, reply: Message) -> None:
    names = _check_names(message, reply, "names")
    if len(reply.tensors) != 1:
        raise _lie(message, f"{len(reply.tensors)} tensors", "one")
    norms = reply.tensors[0].tensor
    if norms.shape != (len(names),) or not norms.is_floating_point():
        raise _lie(message, _look(norms), f"a norm for each of {len(names)} names")
    if (norms < 0).any():  # one that overflowed may be infinite or not a number
        raise _lie(message, f"a norm of {float(norms.nan_to_num().min())}", "none below 0")


def _check_names(message: Message, reply: Message, fact: str) -> list[str]:
    names: list[str] = _fact(message, reply, fact)
    if not _is_list(names, str):
        raise _lie(message, f"{fact} {shown(names)}", "a list of names")
    if len(set(names)) != len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise _lie(message, f"{shown(twice)} twice in {fact}", "each name once")
    return names


def _fact(message: Message, reply: Message, name: str) -> Any:
    if name not in reply.meta:
        raise _lie(
            message, f"the facts {shown(sorted(map(str, reply.meta)))}", f"the fact {name!r}"
        )
    return reply.meta[name]


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


_ROLES: dict[str, Role] = {"forward": "returned", "backward": "smashed_grad", "norms": "norms"}
_CHECKS: dict[str, Callable[[Message, Message], None]] = {
    "open": _check_open,
    "forward": _check_forward,
    "facts": _check_facts,
    "norms": _check_norms,
}


@frozen(eq=False)
class Due:
    """What can be seen of a tensor that is due, without looking into it."""

    role: str
    name: str
    shape: tuple[int, ...] | None  # None: not known beforehand
    dtypes: tuple[torch.dtype, ...]  # one of them
    positions: bool = False  # whether its last two dimensions may be others: they count positions

    @classmethod
    def like(cls, crossing: Crossing) -> Due:
        """What has the outside of `crossing`."""
        tensor = crossing.tensor
        return cls(crossing.role, crossing.name, tuple(tensor.shape), (tensor.dtype,))

    def fits(self, crossing: Crossing) -> bool:
        """Whether `crossing` is what is due."""
        shape, dtype = tuple(crossing.tensor.shape), crossing.tensor.dtype
        named = (crossing.role, crossing.name) == (self.role, self.name)
        return named and dtype in self.dtypes and self._fits_shape(shape)

    def _fits_shape(self, shape: tuple[int, ...]) -> bool:
        if self.shape in (None, shape):
            return True
        if not self.positions or self.shape is None or len(shape) != len(self.shape):
            return False
        return shape[:-2] == self.shape[:-2]

    def __str__(self) -> str:
        shape = "any shape" if self.shape is None else str(self.shape)
        shape += ", the last two as many as there are positions," if self.positions else ""
        return f"{self.role} {self.name} {shape} {' or '.join(map(str, self.dtypes))}"


def check_tensors(kind: str, came: Sequence[Crossing], due: Sequence[Due]) -> None:
    """See that the tensors of a reply are those that are due: how many, their names, roles, shapes and types.

    Raises:
        ProtocolError: They are not; the text says what came and what was due.
    """
    for crossing, one in zip(came, due, strict=False):
        if not one.fits(crossing):
            said = f"{shown(crossing.role)} {shown(crossing.name)}".replace("'", "")
            raise ProtocolError(
                f"The model party answered a {kind} with {said} {_look(crossing.tensor)} where {one} was due."
            )
    if len(came) != len(due):
        raise ProtocolError(
            f"The model party answered a {kind} with {len(came)} tensors where {len(due)} were due."
        )


def _look(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype}"


def _lie(message: Message, came: str, due: str) -> ProtocolError:
    return ProtocolError(
        f"The model party answered a {message.kind!r} with {came} where {due} was due. Nothing of this answer is "
        "used; what it runs is not the protocol of this version."
    )
