"""Running a program at the party that holds its modules: each step on what the steps before it gave."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from attrs import define, field
from torch import Tensor

from vflair_core.communication.codec import DTYPES
from vflair_core.communication.program import (
    MIXING,
    OPERATIONS,
    Program,
    Step,
    Tree,
    fits,
    tensors_of,
)
from vflair_core.errors import ProtocolError


@define
class Execution:
    """One run of a program: `call` makes a module call, `leaves` and `cache` are what the program takes."""

    call: Callable[[str, list[Any], dict[str, Any]], Any]
    leaves: Sequence[Tensor]
    cache: Any = None
    shared: dict[str, Any] = field(factory=dict)
    given: dict[str, Any] = field(factory=dict)  # to the store

    def run(self, program: Program) -> list[Tensor]:
        """Run all steps and return the tensors of the answer, in order."""
        answer = tensors_of(self._outputs(program.steps)[len(program.steps) - 1])
        if program.store:
            new = {k: v for k, v in self.shared.items() if self.given.get(k) is not v}
            answer += tensors_of(new)
        return answer

    def gather(self, steps: Sequence[Step], wanted: Sequence[Tree]) -> list[Tensor]:
        """Run all steps and return the tensors that `wanted` names: leaves, or outputs of steps.

        Raises:
            ProtocolError: One of them is no tensor.
        """
        outputs = self._outputs(steps)
        values = [self._build(tree, outputs) for tree in wanted]
        if not all(isinstance(value, Tensor) for value in values):
            raise ProtocolError("Only tensors can be passed on to the next model party.")
        return values

    def _outputs(self, steps: Sequence[Step]) -> dict[int, Any]:
        outputs: dict[int, Any] = {}
        for number, step in enumerate(steps):
            outputs[number] = self.step(step, outputs)
        return outputs

    def step(self, step: Step, outputs: Mapping[int, Any]) -> Any:
        """Run one step on the `outputs` of those before it."""
        kind, name, args, kwargs = step
        positional = [self._build(tree, outputs) for tree in args]
        named = {
            key: tree[1] if tree[0] == "value" else self._build(tree, outputs)
            for key, tree in kwargs
        }
        if kind == "module":
            return self.call(name, positional, named)
        if name == "getitem" and isinstance(positional[1], tuple):
            _check_index(positional[0], positional[1])
        if name in MIXING and len(positional) > 1 and isinstance(positional[1], Tensor):
            _check_fit(name, positional[0], positional[1])
        return OPERATIONS[name](*positional, **named)

    def _build(self, tree: Tree, outputs: Mapping[int, Any]) -> Any:
        match tree[0]:
            case "leaf":
                return self.leaves[tree[1]]
            case "out":
                value = outputs[tree[1]]
                for key in tree[2:]:
                    value = value[key]
                return value
            case "value":
                return tree[1]
            case "cache":
                return self.cache
            case "shared":
                entries = {key: self._build(item, outputs) for key, item in tree[1:]}
                self.given.update(entries)
                self.shared.update(entries)
                return self.shared
            case "tuple":
                return tuple([self._build(item, outputs) for item in tree[1:]])
            case "list":
                return [self._build(item, outputs) for item in tree[1:]]
            case "dict":
                return {key: self._build(item, outputs) for key, item in tree[1:]}
            case "slice":
                return slice(*tree[1:])
            case "dtype":
                return DTYPES[tree[1]]
            case _:
                return Ellipsis


def _check_index(tensor: Tensor, index: tuple[Any, ...]) -> None:
    """See that an index holds no more than one list of positions, and that it picks none of them twice."""
    lists = [(n, part) for n, part in enumerate(index) if isinstance(part, Tensor)]
    for dimension, positions in lists:
        fits = positions.dim() == 1 and positions.dtype is torch.int64 and len(lists) == 1
        possible = set(range(tensor.shape[dimension]))
        if (
            not fits
            or len(positions.unique()) != len(positions)
            or not possible.issuperset(positions.tolist())
        ):
            raise ProtocolError(
                "Positions are picked by one list of whole numbers, each at most once."
            )


def _check_fit(name: str, first: Tensor, second: Tensor) -> None:
    if not fits(second, first):
        raise ProtocolError(
            f"{name!r} takes a second tensor that fits the first, {tuple(first.shape)}, not {tuple(second.shape)}."
        )
