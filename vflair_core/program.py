"""A recorded program: the calls that the model party is asked to make, and nothing else it could be asked.

The data party writes one, the model party checks and runs it. A program is a list of steps. A step
calls a held module by name or applies one operation of a short list to what came before. Arguments are
trees of tuples whose first entry says what they are:

    ("leaf", i)              the i-th tensor of the message
    ("out", step, *path)     an output of an earlier step
    ("cache",)               the session's key-value cache
    ("shared", (key, tree), ...)  a store that the blocks of this program share; the first call fills it
    ("value", v)             None, a bool, a number or a text
    ("dtype", name)          a torch dtype
    ("slice", a, b, c)       a slice; ("ellipsis",) the rest of the dimensions
    ("tuple" | "list", ...)  and ("dict", (key, tree), ...)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import msgpack
import torch
from attrs import define, field, frozen
from torch import Tensor
from torch.nn import functional

from vflair_core.codec import DTYPES
from vflair_core.errors import ProtocolError

Tree = tuple[Any, ...]
Step = tuple[
    str, str, tuple[Tree, ...], tuple[tuple[str, Tree], ...]
]  # ("module"|"op", name, args, kwargs)
Leaf = tuple[str, str, int]  # (name, dtype, rank)

MAX_STEPS = 4096
MAX_DEPTH = 8

# Arguments that blocks accept through **kwargs and hand on to attention.
ALLOWED = frozenset(
    [
        "hidden_states",
        "attention_mask",
        "position_ids",
        "position_embeddings",
        "past_key_values",
        "cache",
        "use_cache",
        "cache_position",
        "cu_seq_lens_q",
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
        "is_causal",
        "encoder_hidden_states",
        "encoder_attention_mask",
    ]
)
OPERATIONS: dict[str, Callable[..., Any]] = {
    "getitem": torch.Tensor.__getitem__,
    "view": torch.Tensor.view,
    "reshape": torch.Tensor.reshape,
    "flatten": torch.Tensor.flatten,
    "transpose": torch.Tensor.transpose,
    "permute": torch.Tensor.permute,
    "contiguous": torch.Tensor.contiguous,
    "squeeze": torch.Tensor.squeeze,
    "unsqueeze": torch.Tensor.unsqueeze,
    "split": torch.Tensor.split,
    "mul": torch.Tensor.mul,
    "add": torch.Tensor.add,
    "div": torch.Tensor.div,
    "float": torch.Tensor.float,
    "to": torch.Tensor.to,
    "tanh": torch.tanh,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "dropout": functional.dropout,
}
# These may take a second tensor, which must fit the first: what comes out is as large as what went in.
MIXING = frozenset({"add", "mul"})


# eq=False: programs are told apart by `id`, and hashing long step lists again and again costs time.
@frozen(eq=False, slots=False)
class Program:
    """Steps in order, and the tensors they take.

    The answer is what the last step gives and, with `store`, what the blocks wrote to the store they share.
    """

    steps: tuple[Step, ...]
    leaves: tuple[Leaf, ...]
    store: bool = False

    @cached_property
    def id(self) -> str:
        """Digest of the content: equal programs have equal ids in every process."""
        return hashlib.sha256(msgpack.packb(self.to_wire())).hexdigest()[:16]

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules called, in order."""
        return tuple(name for kind, name, _, _ in self.steps if kind == "module")

    def to_wire(self) -> list[Any]:
        """As values msgpack can carry."""
        return [self.steps, self.leaves, self.store]

    @classmethod
    def from_wire(cls, wire: Any) -> Program:
        """Read what `to_wire` wrote, checking the form of everything.

        Raises:
            ProtocolError: The form is wrong, or an operation is not on the list.
        """
        match wire:
            case [[*steps], [*leaves], bool() as store] if len(steps) <= MAX_STEPS:
                program = cls(
                    tuple(_step(step) for step in steps),
                    tuple(_leaf(leaf) for leaf in leaves),
                    store,
                )
            case _:
                raise ProtocolError(
                    f"A program must be [steps, leaves, store], <= {MAX_STEPS} steps."
                )
        if not program.steps:
            raise ProtocolError("A program must have at least one step.")
        return program


def _step(step: Any) -> Step:
    match step:
        case [("module" | "op") as kind, str() as name, [*args], [*kwargs]]:
            if kind == "op" and name not in OPERATIONS:
                raise ProtocolError(
                    f"Operation {name!r} is not on the list: {', '.join(OPERATIONS)}."
                )
            named = tuple((str(key), _tree(tree)) for key, tree in kwargs)
            return kind, name, tuple(_tree(tree) for tree in args), named
        case _:
            raise ProtocolError(f"A step must be [kind, name, args, kwargs], not {step!r}.")


def _leaf(leaf: Any) -> Leaf:
    match leaf:
        case [str() as name, str() as dtype, int() as rank] if dtype in DTYPES:
            return name, dtype, rank
        case _:
            raise ProtocolError(f"A leaf must be [name, dtype, rank], not {leaf!r}.")


def _tree(tree: Any, depth: int = 0) -> Tree:
    if depth > MAX_DEPTH:
        raise ProtocolError(f"An argument is nested more than {MAX_DEPTH} deep.")
    match tree:
        case ["leaf", int() as index] if index >= 0:
            return "leaf", index
        case ["out", int() as step, *path] if step >= 0 and all(
            type(p) in (int, str) for p in path
        ):
            return ("out", step, *path)
        case ["cache"] | ["ellipsis"]:
            return (tree[0],)
        case ["value", (None | bool() | int() | float() | str()) as value]:
            return "value", value
        case ["dtype", str() as name] if name in DTYPES:
            return "dtype", name
        case ["slice", *ends] if len(ends) == 3 and all(e is None or type(e) is int for e in ends):
            return ("slice", *ends)
        case [("tuple" | "list") as kind, *items]:
            return (kind, *(_tree(item, depth + 1) for item in items))
        case [("dict" | "shared") as kind, *items]:
            return (kind, *((str(key), _tree(item, depth + 1)) for key, item in items))
        case _:
            raise ProtocolError(f"{tree!r} is not an argument a program may hold.")


def sources(step: Step) -> list[int]:
    """Numbers of the steps whose outputs `step` takes."""
    found = []

    def walk(tree: Any) -> None:
        if tree[0] == "out":
            found.append(tree[1])
        elif tree[0] in ("tuple", "list"):
            for item in tree[1:]:
                walk(item)
        elif tree[0] in ("dict", "shared"):
            for _, item in tree[1:]:
                walk(item)

    for tree in (*step[2], *(tree for _, tree in step[3])):
        walk(tree)
    return found


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
        found = [self._build(tree, outputs) for tree in wanted]
        if not all(isinstance(value, Tensor) for value in found):
            raise ProtocolError("Only tensors can be passed on to the next model party.")
        return found

    def _outputs(self, steps: Sequence[Step]) -> dict[int, Any]:
        outputs: dict[int, Any] = {}
        for number, step in enumerate(steps):
            outputs[number] = self.step(step, outputs)
        return outputs

    def step(self, step: Step, outputs: Mapping[int, Any]) -> Any:
        """Run one step on the `outputs` of those before it."""
        kind, name, args, kwargs = step
        positional = [self._build(tree, outputs) for tree in args]
        named = {key: self._build(tree, outputs) for key, tree in kwargs}
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
                return _at(outputs[tree[1]], tree[2:])
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
                return tuple(self._build(item, outputs) for item in tree[1:])
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
        there = set(range(tensor.shape[dimension]))
        if (
            not fits
            or len(positions.unique()) != len(positions)
            or not there.issuperset(positions.tolist())
        ):
            raise ProtocolError(
                "Positions are picked by one list of whole numbers, each at most once."
            )


def _check_fit(name: str, first: Tensor, second: Tensor) -> None:
    """See that `second` is spread over `first`, never the other way: a product of rows would grow without bound."""
    sizes = zip(first.shape[::-1], second.shape[::-1], strict=False)
    if second.dim() > first.dim() or any(b not in (1, a) for a, b in sizes):
        raise ProtocolError(
            f"{name!r} takes a second tensor that fits the first, {tuple(first.shape)}, not {tuple(second.shape)}."
        )


def _at(value: Any, path: tuple[int | str, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def tensors_of(value: Any) -> list[Tensor]:
    """Return the tensors of a nested output, in order; caches and None hold none."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in tensors_of(item)]
    return []
