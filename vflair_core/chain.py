"""The one chain of calls that a model party runs, whatever a message asks for."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from vflair_core.errors import ProtocolError
from vflair_core.program import ALLOWED, Program, Step


class Chain:
    """The held modules `names` of `model`, in the order in which they call each other."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        self.model, self.names = model, names
        modules = {name: model.get_submodule(name) for name in names}
        self._arguments = {
            name: tuple(inspect.signature(module.forward).parameters)
            for name, module in modules.items()
        }
        self.layers = sorted(
            {
                index
                for module in modules.values()
                for part in module.modules()
                if isinstance(index := getattr(part, "layer_idx", None), int)
            }
        )

    def call(self, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Call the module that goes by `name` now: adapters may have taken the place of the first one.

        The first argument goes by position: an adapter gives it another name, and reentrant checkpointing
        sees no gradient in a named one.
        """
        first = self._arguments[name][0]
        if first in kwargs:
            args = [*args, kwargs.pop(first)]
        return self.model.get_submodule(name)(*args, **kwargs)

    def check(self, program: Program) -> None:
        """See that each module is called once, in order, each step fed by the one before it.

        Raises:
            ProtocolError: The program asks for anything else.
        """
        if program.modules != self.names or program.output != ():
            raise ProtocolError(
                f"A program must call {self.names[0]} … {self.names[-1]} once each, in order, and return the "
                f"last output. This one calls {', '.join(program.modules)}."
            )
        for number, step in enumerate(program.steps):
            self._check_step(step)
            if number and not any(source == number - 1 for source in _sources(step)):
                raise ProtocolError(
                    f"Step {number} ({step[1]}) does not use the output of the step before."
                )
            if any(source >= number for source in _sources(step)):
                raise ProtocolError(
                    f"Step {number} ({step[1]}) uses an output that does not exist yet."
                )

    def _check_step(self, step: Step) -> None:
        """An operation takes one value and numbers, so that nothing it gives is larger; a call, known names."""
        kind, name, args, kwargs = step
        if kind == "module":
            unknown = [key for key, _ in kwargs if key not in ALLOWED.union(self._arguments[name])]
            if unknown or args:
                raise ProtocolError(f"{name} is called by name, and with nothing like {unknown}.")
            return
        others = [*args[1:], *dict(kwargs).values()]
        if not args or args[0][0] not in ("out", "leaf") or not all(map(_is_number, others)):
            raise ProtocolError(f"Operation {name!r} takes one tensor, then numbers.")


def _is_number(tree: Any) -> bool:
    if tree[0] == "tuple":
        return all(map(_is_number, tree[1:]))
    return tree[0] in ("dtype", "slice", "ellipsis") or (
        tree[0] == "value" and not isinstance(tree[1], str)
    )


def _sources(step: Step) -> list[int]:
    found = []

    def walk(tree: Any) -> None:
        if tree[0] == "out":
            found.append(tree[1])
        elif tree[0] in ("tuple", "list"):
            for item in tree[1:]:
                walk(item)
        elif tree[0] == "dict":
            for _, item in tree[1:]:
                walk(item)

    for tree in (*step[2], *(tree for _, tree in step[3])):
        walk(tree)
    return found
