"""Running a program at the party that holds its modules: each step on what the steps before it gave.

What an operation costs is known before it is run. Outputs are let go of after their last use.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from attrs import define, field
from torch import Tensor

from vflair_core.communication.codec import DTYPES
from vflair_core.communication.program import (
    MIXING,
    OPERATIONS,
    VIEWING,
    Program,
    Step,
    Tree,
    fits,
    tensors_of,
)
from vflair_core.errors import ProtocolError, shown

MAX_PIECES = 256  # that one tensor is split into


@define
class Execution:
    """One run of a program: `call` makes a module call, `leaves` and `cache` are what the program takes.

    `most` is how many bytes of what operations gave may be held at a time; with gradients, all of it is.
    """

    call: Callable[[str, list[Any], dict[str, Any]], Any]
    leaves: Sequence[Tensor]
    cache: Any = None
    most: int = 2**63
    shared: dict[str, Any] = field(factory=dict)
    given: dict[str, Any] = field(factory=dict)  # to the store
    _held: dict[int, int] = field(factory=dict)  # bytes that each step's operation took
    _bytes: int = 0  # their sum

    def run(self, program: Program) -> list[Tensor]:
        """Run all steps and return the tensors of the answer, in order.

        Raises:
            ProtocolError: An operation would take too much memory, or gets what it does not take.
        """
        last = len(program.steps) - 1
        answer = tensors_of(self._outputs(program, {last})[last])
        if program.store:
            new = {k: v for k, v in self.shared.items() if self.given.get(k) is not v}
            answer += tensors_of(new)
        return answer

    def gather(self, program: Program | None, wanted: Sequence[Tree]) -> list[Tensor]:
        """Run all steps and return the tensors that `wanted` names: leaves, or outputs of steps.

        Raises:
            ProtocolError: As `run`; or one of them is no tensor.
        """
        kept = {tree[1] for tree in wanted if tree[0] == "out"}
        outputs = self._outputs(program, kept) if program is not None else {}
        values = [self._build(tree, outputs) for tree in wanted]
        if not all(isinstance(value, Tensor) for value in values):
            raise ProtocolError("Only tensors can be passed on to the next model party.")
        return values

    def _outputs(self, program: Program, kept: Collection[int]) -> dict[int, Any]:
        outputs: dict[int, Any] = {}
        for number, (step, gone) in enumerate(zip(program.steps, program.last_uses, strict=True)):
            outputs[number] = self.step(step, outputs, number)
            for source in gone:
                if source not in kept:
                    del outputs[source]
                    if not torch.is_grad_enabled():  # or the graph holds it
                        self._bytes -= self._held.pop(source, 0)
        return outputs

    def step(self, step: Step, outputs: Mapping[int, Any], number: int = 0) -> Any:
        """Run one step, `number` of its program, on the `outputs` of those before it."""
        kind, name, args, kwargs = step
        positional = [self._build(tree, outputs) for tree in args]
        named = {
            key: tree[1] if tree[0] == "value" else self._build(tree, outputs)
            for key, tree in kwargs
        }
        if kind == "module":
            return self.call(name, positional, named)
        first = positional[0]
        if not isinstance(first, Tensor):
            raise ProtocolError(f"{name!r} takes a tensor, not {type(first).__name__}.")
        if name == "getitem":
            _check_index(first, positional[1])
        if name == "split":
            _check_pieces(first, positional[1:], named)
        if name in MIXING and len(positional) > 1 and isinstance(positional[1], Tensor):
            _check_fit(name, first, positional[1])
        cost = _cost(name, first, [*positional[1:], *named.values()])
        if not cost and args[0][0] == "out" and not torch.is_grad_enabled():
            cost = self._held.get(args[0][1], 0)  # a view holds what it is a view of
        if cost > self.most - self._bytes:
            raise ProtocolError(
                f"{name!r} of step {number} would take {cost} bytes beside the {self._bytes} that operations before it hold; "
                f"the model party allows {self.most} (its limit step_bytes)."
            )
        output = OPERATIONS[name](*positional, **named)
        if cost:
            self._held[number] = cost
            self._bytes += cost
        return output

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


def _cost(name: str, first: Tensor, others: Sequence[Any]) -> int:
    """Bytes that an operation may take at most; it gives no more elements than its first tensor has."""
    if name in VIEWING and not _picks(others):
        return 0
    sizes = [first.dtype.itemsize]
    if name == "float":
        sizes.append(torch.float32.itemsize)
    for other in others:
        if isinstance(other, torch.dtype):
            sizes.append(other.itemsize)
        elif isinstance(other, Tensor):
            sizes.append(torch.result_type(first, other).itemsize)
    masks = 2 if name == "dropout" else 1
    return first.numel() * max(sizes) * masks


def _picks(index: Sequence[Any]) -> bool:
    return any(
        isinstance(part, Tensor) for each in index if isinstance(each, tuple) for part in each
    )


def _check_index(tensor: Tensor, index: Any) -> None:
    """See that an index is flat, and holds no more than one list of positions, none of them twice."""
    parts = index if isinstance(index, tuple) else (index,)
    flat = (int, slice, Tensor, type(None), type(...))
    if not all(isinstance(part, flat) and not isinstance(part, bool) for part in parts):
        raise ProtocolError(
            "An index is a whole number, a slice, ..., None, or a flat list of these and of positions."
        )
    takes = [part for part in parts if part is not None and part is not ...]
    if len(takes) > tensor.dim() or sum(part is ... for part in parts) > 1:
        raise ProtocolError(
            f"An index of {len(takes)} parts came for a tensor of rank {tensor.dim()}."
        )
    lists = [n for n, part in enumerate(parts) if isinstance(part, Tensor)]
    if not lists:
        return
    behind = next((n for n, part in enumerate(parts) if part is ...), len(parts))
    position = lists[0]
    taken = [part is not None and part is not ... for part in parts]
    # After an ellipsis, dimensions count from the end.
    dimension = sum(taken[:position]) if position < behind else tensor.dim() - sum(taken[position:])
    positions, size = parts[position], tensor.shape[dimension]
    fits = positions.dim() == 1 and positions.dtype is torch.int64 and len(lists) == 1
    if not fits or len(positions) > size or not _are_distinct(positions, size):
        raise ProtocolError("Positions are picked by one list of whole numbers, each at most once.")


def _are_distinct(positions: Tensor, size: int) -> bool:
    if not len(positions):
        return True
    ordered = positions.sort().values
    inside = int(ordered[0]) >= 0 and int(ordered[-1]) < size
    return inside and not bool((ordered[1:] == ordered[:-1]).any())


def _check_pieces(tensor: Tensor, args: Sequence[Any], named: Mapping[str, Any]) -> None:
    sizes = args[0] if args else named.get("split_size")
    dim = args[1] if len(args) > 1 else named.get("dim", 0)
    if not isinstance(dim, int) or not -tensor.dim() <= dim < tensor.dim():
        raise ProtocolError(f"A tensor of rank {tensor.dim()} cannot be split along {shown(dim)}.")
    if isinstance(sizes, (tuple, list)):
        pieces = len(sizes)
    elif isinstance(sizes, int) and sizes >= 1:
        pieces = -(-tensor.shape[dim] // sizes)
    else:
        raise ProtocolError(f"A tensor cannot be split into pieces of {shown(sizes)}.")
    if pieces > MAX_PIECES:
        raise ProtocolError(f"A tensor is split into {MAX_PIECES} pieces at most, not {pieces}.")


def _check_fit(name: str, first: Tensor, second: Tensor) -> None:
    if not fits(second, first):
        raise ProtocolError(
            f"{name!r} takes a second tensor that fits the first, {tuple(first.shape)}, not {tuple(second.shape)}."
        )
