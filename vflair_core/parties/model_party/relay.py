"""What a model party of a chain passes on to the next, which takes it for a data party.

The data party talks to the first and knows nothing of the others. The first runs the modules it holds and
sends the rest of the program on with what that takes; the gradients come back the same way. `divide` makes
a chain of a model party in memory, `load_model_party(share=..., onward=...)` one of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attrs import define, field, frozen
from torch import Tensor, nn

from vflair_core.communication.autograd import Request, cross
from vflair_core.communication.channel import Channel
from vflair_core.communication.codec import NAMES
from vflair_core.communication.connection import Connection
from vflair_core.communication.message import Message, Role
from vflair_core.communication.program import Leaf, Program, Step, Tree
from vflair_core.errors import ProtocolError


@frozen(eq=False)
class Rest:
    """The steps of a program that are not run here, and where the tensors they take come from."""

    steps: tuple[Step, ...]
    sources: tuple[
        Tree, ...
    ]  # of each tensor: ("leaf", i) of the message, or ("out", step, *path) of a step here
    store: bool  # whether states that blocks share come back too
    _programs: dict[tuple[Leaf, ...], Program] = field(factory=dict)

    def program(self, leaves: Sequence[Leaf]) -> Program:
        """Return the program that the next party runs on tensors of these names, dtypes and ranks."""
        key = tuple(leaves)
        if key not in self._programs:
            self._programs[key] = Program(self.steps, key, self.store)
        return self._programs[key]


def divide_program(
    program: Program, held: Callable[[str], bool]
) -> tuple[Program | None, Rest | None]:
    """Return what of a program calls held modules, up to the first that is not, and what comes then.

    Raises:
        ProtocolError: Blocks here share a store of states with others.
    """
    calls = [(n, name) for n, (kind, name, _, _) in enumerate(program.steps) if kind == "module"]
    first = next((n for n, name in calls if not held(name)), None)
    if first is None:
        return program, None
    numbers: dict[Tree, int] = {}

    def moved(tree: Tree) -> Tree:
        match tree[0]:
            case "out" if tree[1] >= first:
                return ("out", tree[1] - first, *tree[2:])
            case "leaf" | "out":
                return "leaf", numbers.setdefault(tree, len(numbers))
            case "tuple" | "list":
                return (tree[0], *map(moved, tree[1:]))
            case "dict" | "shared":
                return (tree[0], *((key, moved(item)) for key, item in tree[1:]))
            case _:
                return tree

    steps = tuple(
        (kind, name, tuple(map(moved, args)), tuple((key, moved(tree)) for key, tree in kwargs))
        for kind, name, args, kwargs in program.steps[first:]
    )
    here = program.steps[:first]
    if any(tree[0] == "shared" for *_, kwargs in here for _, tree in kwargs):
        raise ProtocolError(
            "Blocks of the first model party of a chain share states with others, and they cannot be in two places. "
            "Hold these blocks at one model party."
        )
    rest = Rest(steps, tuple(numbers), program.store)
    return (Program(here, program.leaves) if here else None), rest


@define(eq=False)
class Relay:
    """One session's way on to the next model party, which takes it for a data party."""

    connection: Connection
    model: nn.Module  # of the party that passes on; its training mode goes along

    @classmethod
    def to(
        cls, channel: Channel, fingerprint: str, session: str, step: int, model: nn.Module
    ) -> Relay:
        """Prepare the way on for a session, under its own name; `connection.open` opens it."""
        connection = Connection(channel, fingerprint)
        connection.session, connection.step = session, step
        return cls(connection, model)

    def cross(self, message: Message, rest: Rest, values: Sequence[Tensor]) -> list[Tensor]:
        """Let the next party run `rest` on `values`, and return what it answers, with gradients."""
        roles: list[Role] = []
        leaves: list[Leaf] = []
        for source, value in zip(rest.sources, values, strict=True):
            crossing = message.tensors[source[1]] if source[0] == "leaf" else None
            roles.append(crossing.role if crossing else "smashed")
            name = crossing.name if crossing else "hidden_states"
            leaves.append((name, NAMES[value.dtype], value.dim()))
        request = Request(
            self.connection,
            message.exchange,
            message.phase,
            rest.program(leaves),
            tuple(roles),
            message.meta.get("cache"),
            training=self.model.training,
            counterparts=True,  # of this session there are none
            inspect=lambda _: None,  # it came from a data party, whose defenses have acted
            guard=lambda _, gradient: gradient,
            adapters=message.meta.get("adapters"),
        )
        return list(cross(request, list(values)))

    def pass_on_released(self, meta: Mapping[str, Any]) -> None:
        """Caches that the data party dropped or copied: the next party has its half of each."""
        self.connection.copies += [(old, new) for old, new in meta.get("copied_caches", ())]
        self.connection.caches += list(meta.get("released_caches", ()))
