"""What a client of the server may do, and which right a message needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

from attrs import field, frozen

from vflair_core.errors import ProtocolError

if TYPE_CHECKING:
    from vflair_core.communication.message import Message

Right = Literal[
    "infer",  # open sessions, send hidden states, get what comes back of them
    "train",  # open with an optimizer, leave gradients, take steps
    "save",  # have the model party's half of a run written down
    "resume",  # go back to what was written down
]
RIGHTS: tuple[Right, ...] = get_args(Right)
_TRAINS = ("norms", "prepare", "commit")


def _known(_: object, __: object, rights: frozenset[str]) -> None:
    if unknown := sorted(rights - set(RIGHTS)):
        raise ProtocolError(
            f"There is no right {', '.join(map(repr, unknown))}. Possible: {', '.join(RIGHTS)}."
        )


@frozen
class Client:
    """Who is at the other end of a stream, as it was authenticated."""

    name: str
    rights: frozenset[Right] = field(
        default=frozenset(RIGHTS), converter=frozenset, validator=_known
    )

    def check(self, message: Message) -> None:
        """See that this client may send `message`.

        Raises:
            ProtocolError: It lacks a right.
        """
        if missing := [right for right in needed(message) if right not in self.rights]:
            have = ", ".join(right for right in RIGHTS if right in self.rights) or "none"
            raise ProtocolError(
                f"Client {self.name!r} may not {missing[0]} here: this {message.kind!r} needs the right "
                f"{missing[0]!r}, and it has {have}. The server's operator gives rights."
            )


def needed(message: Message) -> list[Right]:
    """Return the rights that a message needs."""
    meta = message.meta
    rights: list[Right] = ["infer"]
    if message.kind == "open":
        rights += ["train"] if meta.get("optimizer") is not None else []
        rights += ["resume"] if meta.get("resume") is not None else []
    elif message.kind in _TRAINS or (
        message.kind == "backward" and meta.get("accumulate", True) is not False
    ):
        rights.append("train")
    elif message.kind == "save":
        rights.append("save")
    return rights
