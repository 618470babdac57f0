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
import marshal
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import msgpack
import torch
from attrs import frozen
from torch import Tensor
from torch.nn import functional

from vflair_core.communication.codec import DTYPES
from vflair_core.errors import ProtocolError, shown

Tree = tuple[Any, ...]
Step = tuple[
    str, str, tuple[Tree, ...], tuple[tuple[str, Tree], ...]
]  # ("module"|"op", name, args, kwargs)
Leaf = tuple[str, str, int]  # (name, dtype, rank)

_IDS: dict[bytes, str] = {}  # of programs met before, by their content
MAX_IDS = 1024  # forgetting them costs time only
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
        "seq_idx",
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
# These change a shape and no value.
RESHAPING = frozenset({"view", "reshape", "flatten"})
# These give a view of what they take, unless positions are picked.
VIEWING = frozenset({"getitem", "view", "transpose", "permute", "squeeze", "unsqueeze", "split"})
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
        # Each step of a generation makes its program anew. What marshal writes (without references: 2) differs wherever
        # what msgpack writes does, and takes a fifth of the time.
        try:
            content = marshal.dumps(self.to_wire(), 2)
        except ValueError:  # a number or a text of a class of its own
            return self._digest()
        if content not in _IDS:
            if len(_IDS) >= MAX_IDS:
                _IDS.clear()
            _IDS[content] = self._digest()
        return _IDS[content]

    def _digest(self) -> str:
        return hashlib.sha256(msgpack.packb(self.to_wire())).hexdigest()[:16]

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules called, in order."""
        return tuple(name for kind, name, _, _ in self.steps if kind == "module")

    @cached_property
    def last_uses(self) -> tuple[tuple[int, ...], ...]:
        """For each step, the steps before it whose outputs no later step takes."""
        return last_uses(self.steps)

    @cached_property
    def residual(self) -> frozenset[int]:
        """Numbers of the tensors that a module takes as its hidden states: they are on the residual path."""
        first = [dict(kwargs) for kind, _, _, kwargs in self.steps if kind == "module" and kwargs]
        trees = [named.get("hidden_states", next(iter(named.values()))) for named in first]
        return frozenset(tree[1] for tree in trees if tree[0] == "leaf")

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
                    f"Operation {shown(name)} is not on the list: {', '.join(OPERATIONS)}."
                )
            named = tuple((str(key), _tree(tree)) for key, tree in kwargs)
            return kind, name, tuple(_tree(tree) for tree in args), named
        case _:
            raise ProtocolError(f"A step must be [kind, name, args, kwargs], not {shown(step)}.")


def _leaf(leaf: Any) -> Leaf:
    match leaf:
        case [str() as name, str() as dtype, int() as rank] if dtype in DTYPES and rank >= 0:
            return name, dtype, rank
        case _:
            raise ProtocolError(f"A leaf must be [name, dtype, rank], not {shown(leaf)}.")


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
            raise ProtocolError(f"{shown(tree)} is not an argument a program may hold.")


def sources(step: Step) -> list[int]:
    """Numbers of the steps whose outputs `step` takes."""
    steps = []

    def walk(tree: Any) -> None:
        if tree[0] == "out":
            steps.append(tree[1])
        elif tree[0] in ("tuple", "list"):
            for item in tree[1:]:
                walk(item)
        elif tree[0] in ("dict", "shared"):
            for _, item in tree[1:]:
                walk(item)

    for tree in (*step[2], *(tree for _, tree in step[3])):
        walk(tree)
    return steps


def last_uses(steps: Sequence[Step]) -> tuple[tuple[int, ...], ...]:
    """For each step, the steps before it whose outputs no later step takes."""
    last = {source: number for number, step in enumerate(steps) for source in sources(step)}
    gone: list[list[int]] = [[] for _ in steps]
    for source, number in last.items():
        gone[number].append(source)
    return tuple(map(tuple, gone))


def tensors_of(value: Any) -> list[Tensor]:
    """Return the tensors of a nested output, in order; caches and None hold none."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in tensors_of(item)]
    return []


def fits(second: Tensor, first: Tensor) -> bool:
    """Whether `second` is spread over `first`, and never the other way: a product of rows would grow without bound."""
    sizes = zip(first.shape[::-1], second.shape[::-1], strict=False)
    return second.dim() <= first.dim() and all(b in (1, a) for a, b in sizes)
