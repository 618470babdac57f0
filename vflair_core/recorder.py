"""The recorder: writes down the calls of absent modules until a program is complete, then hands it over.

When the last absent module is called, or when a value is needed before that, the recorded program goes to
the protocol and real tensors come back. Nothing here knows a model family.
"""

from __future__ import annotations

import copy
import functools
from collections import Counter, UserDict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from attrs import define, field
from torch import Tensor
from transformers.cache_utils import Cache

from vflair_core.blocks import Stage
from vflair_core.cache import holds_past
from vflair_core.codec import DTYPES
from vflair_core.deferred import Deferred
from vflair_core.errors import LeakError, PartitionError, ProtocolError
from vflair_core.program import ALLOWED, OPERATIONS, Leaf, Program, Step, Tree, tensors_of

if TYPE_CHECKING:
    from vflair_core.absent import Absent

# Hands a program, the tensors it takes, the cache and the form of the answer (meta tensors) to the protocol;
# returns the answer's tensors.
Handover = Callable[[Program, list[Tensor], "Cache | None", list[Tensor]], list[Tensor]]

# Arguments that transformers threads through every block and that no block computes with.
DROPPED = frozenset(
    [
        "input_ids",
        "decoder_input_ids",
        "labels",
        "shift_labels",
        "num_items_in_batch",
        "logits_to_keep",
        "return_dict",
        "output_hidden_states",
        "output_attentions",
        "output_router_logits",
    ]
)
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_STRUCTURES = 4096  # remembered shapes; forgetting them costs time only


@define(eq=False)
class Recorder:
    """Writes down the calls of absent modules until a program is complete, then hands it over."""

    handover: Handover
    stages: tuple[Stage, ...] = ()  # what the model party runs at a time: a program is one of them
    absent: dict[str, Absent] = field(factory=dict)  # the stand-ins that record here
    steps: list[Step] = field(factory=list)
    tensors: list[Tensor] = field(factory=list)
    leaves: list[Leaf] = field(factory=list)
    cache: Cache | None = None
    calls: Counter[str] = field(
        factory=Counter
    )  # of shared blocks, since the model was last called
    _called: list[str] = field(factory=list)  # modules of the program so far
    _known: dict[int, int] = field(factory=dict)
    _structures: dict[Any, Any] = field(factory=dict)
    _learnt: dict[str, Any] = field(factory=dict)  # of each module the last, and its input's shape

    def begin(self) -> None:
        """Make ready for a new call of the model."""
        self.reset()
        self.calls.clear()

    def reset(self) -> None:
        """Forget what was recorded."""
        self.steps, self.tensors, self.leaves, self.cache = [], [], [], None
        self._known, self._called = {}, []

    def call(self, absent: Absent, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record the call of an absent module."""
        named = dict(zip(absent.parameter_names, args, strict=False)) | _checked(absent, kwargs)
        trees = {key: self._tree(value, key) for key, value in named.items()}
        self.steps.append(("module", absent.name, (), tuple(trees.items())))
        self._called.append(absent.name)
        structure = self._structure(absent, named, trees)
        local_cache = next((value for value in named.values() if isinstance(value, Cache)), None)
        if self._is_complete():
            shapes = tensors_of(structure)
            answer = self._fire((), shapes)
            if len(answer) != len(shapes):
                raise ProtocolError(
                    f"{absent.name} returns {len(shapes)} tensors; {len(answer)} came back."
                )
            real = iter(answer)
            return _map(structure, lambda _meta, _path: next(real), local_cache)
        device, step = _first(named).device, len(self.steps) - 1
        return _map(
            structure,
            lambda m, path: Deferred.of(m, device, self, ("out", step, *path)),
            local_cache,
        )

    def _is_complete(self) -> bool:
        called = tuple(self._called)
        return any(stage.ends_with(called) for stage in self.stages)

    def apply(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record an operation of the list on a deferred tensor."""
        subject: Deferred = args[0]
        trees = tuple(self._tree(value, name) for value in args)
        named = tuple((key, self._tree(value, name)) for key, value in kwargs.items())
        self.steps.append(("op", name, trees, named))
        device, step = subject.device, len(self.steps) - 1
        shapes = OPERATIONS[name](subject.meta, *args[1:], **kwargs)
        return _map(
            shapes, lambda m, path: Deferred.of(m, device, self, ("out", step, *path)), None
        )

    def realise(self, deferred: Deferred) -> Tensor:
        """Fetch the value of a deferred tensor before the program is complete."""
        kind, step, *path = deferred.node
        if kind != "out" or step != len(self.steps) - 1:
            raise PartitionError(
                "The model needs a value from the middle of the model party's layers: the output of step "
                f"{step} ({self._step_name(step)}) after {self._step_name(-1)} was called. "
                "Choose a cut after that layer; `verify` says which cuts work."
            )
        return self._fire(tuple(path), [deferred.meta])[0]

    def _step_name(self, step: int) -> str:
        return self.steps[step][1] if -len(self.steps) <= step < len(self.steps) else "nothing"

    def _fire(self, output: tuple[int | str, ...], shapes: list[Tensor]) -> list[Tensor]:
        program = Program(tuple(self.steps), tuple(self.leaves), output)
        tensors, cache = self.tensors, self.cache
        self.reset()
        return self.handover(program, tensors, cache, shapes)

    def _tree(self, value: Any, name: str) -> Tree:
        match value:
            case Deferred():
                if value.recorder is not self or value.node[1] >= len(self.steps):
                    raise PartitionError(
                        f"Argument {name!r} uses a value from inside the model party that was not sent back."
                    )
                return value.node
            case Tensor():
                return "leaf", self._leaf(value, name)
            case None | bool() | int() | float() | str():
                return "value", value
            case Cache():
                self.cache = value
                return ("cache",)
            case tuple() | list():
                kind = "tuple" if isinstance(value, tuple) else "list"
                return (kind, *(self._tree(item, f"{name}.{n}") for n, item in enumerate(value)))
            case dict():
                return (
                    "dict",
                    *((key, self._tree(item, f"{name}.{key}")) for key, item in value.items()),
                )
            case UserDict() if (
                not value
            ):  # states that blocks share among themselves, none of them ours
                _close(value)
                return ("shared",)
            case slice():
                return "slice", value.start, value.stop, value.step
            case torch.dtype():
                return "dtype", _DTYPE_NAMES[value]
            case _ if value is Ellipsis:
                return ("ellipsis",)
            case _:
                raise PartitionError(
                    f"Argument {name!r} is a {type(value).__name__}, which cannot cross. Tensors, numbers, "
                    "texts and caches can."
                )

    def _leaf(self, tensor: Tensor, name: str) -> int:
        index = self._known.get(id(tensor))
        if index is None:
            index = self._known[id(tensor)] = len(self.tensors)
            self.tensors.append(tensor)
            self.leaves.append((name, _DTYPE_NAMES[tensor.dtype], tensor.dim()))
        return index

    def _structure(self, absent: Absent, named: dict[str, Any], trees: dict[str, Tree]) -> Any:
        """What the module returns, with meta tensors for tensors. Learned once per shape of its input."""
        hidden = _first(named)
        literals = tuple((key, tree) for key, tree in trees.items() if tree[0] == "value")
        key = (absent.name, tuple(hidden.shape), hidden.dtype, absent.training, literals)
        if len(self._structures) >= MAX_STRUCTURES:
            self._structures.clear()
        if key not in self._structures:
            self._structures[key] = self._learned(absent, named, hidden)
        return self._structures[key]

    def _learned(self, absent: Absent, named: dict[str, Any], hidden: Tensor) -> Any:
        """What the module returns, found by running its skeleton, or from what it returned for other lengths."""
        known, shape = self._learnt.get(absent.name, (None, None))

        def resized(tensor: Tensor, _path: Tree) -> Tensor:
            # What had the shape of the input has it again; of anything else the shape is not known now.
            size = hidden.shape if tensor.shape == shape else (0,)
            return torch.empty(size, dtype=tensor.dtype, device="meta")

        try:
            structure = _run_skeleton(absent, named)
        except PartitionError:
            if shape is None:
                raise
            return _map(known, resized, None)
        self._learnt[absent.name] = structure, hidden.shape
        return structure


def _close(shared: UserDict[str, Any]) -> None:
    """From here on the model party's blocks write to a store of their own, which a local block cannot read."""
    if not hasattr(shared, "__missing__"):
        shared.__class__ = _closed(type(shared))


@functools.cache
def _closed(kind: type) -> Any:
    def missing(_self: Any, key: str) -> Any:
        raise PartitionError(
            f"A block of the data party needs {key!r}, which a block of the model party computed. Choose a cut after "
            "the last block that shares its states, or HT."
        )

    return type(kind.__name__, (kind,), {"__missing__": missing})


def _checked(absent: Absent, kwargs: dict[str, Any]) -> dict[str, Any]:
    kept = {}
    for key, value in kwargs.items():
        if key in absent.parameter_names or key in ALLOWED:
            kept[key] = value
        elif key not in DROPPED and value is not None:
            raise LeakError(
                f"{absent.name} was called with {key!r}, which is not an argument a block is known to take. "
                f"It stays with the data party. Known: {', '.join(sorted(ALLOWED))} and the block's own "
                f"{', '.join(absent.parameter_names)}."
            )
    return kept


def _first(named: dict[str, Any]) -> Tensor:
    return next(value for value in named.values() if isinstance(value, Tensor))


def _run_skeleton(absent: Absent, named: dict[str, Any]) -> Any:
    """Run a block on the meta device for its shapes: without cache, and without the mask that fits it."""
    past = next((value for value in named.values() if isinstance(value, Cache)), None)
    has_past = past is not None and holds_past(past, absent.layers)

    def to_meta(value: Any, key: str) -> Any:
        if isinstance(value, Deferred):
            return value.meta
        if isinstance(value, Tensor):
            return None if has_past and "mask" in key else torch.empty_like(value, device="meta")
        if isinstance(value, (tuple, list)):
            return _like(value, [to_meta(item, key) for item in value])
        return None if isinstance(value, Cache) else value

    shadow = {key: to_meta(value, key) for key, value in named.items()}
    absent.skeleton.train(absent.training)
    try:
        with torch.no_grad():
            return absent.skeleton(**shadow)
    except Exception:  # noqa: BLE001 - any operation may lack a meta kernel; zeros can be computed with
        kept = {key: named[key] if shadow[key] is not None else None for key in named}
        return _run_on_zeros(absent, kept)


def _run_on_zeros(absent: Absent, named: dict[str, Any]) -> Any:
    """Run a block whose shapes depend on values (a router's choice of experts) with zeros for weights."""

    def known(value: Any) -> Any:
        if isinstance(value, Deferred):
            return torch.zeros(value.meta.shape, dtype=value.meta.dtype)
        if isinstance(value, Tensor):
            return value.detach().cpu()
        if isinstance(value, (tuple, list)):
            return _like(value, map(known, value))
        return value

    try:
        block = copy.deepcopy(absent.skeleton).to_empty(device="cpu")
        with torch.no_grad(), torch.random.fork_rng([]):
            for weight in (*block.parameters(), *block.buffers()):
                weight.zero_()
            answer = block(**{key: known(value) for key, value in named.items()})
        return _map(answer, lambda tensor, _path: tensor.to("meta"), None)
    except Exception as error:
        raise PartitionError(
            f"The shapes that {absent.name} ({type(absent.skeleton).__name__}) returns could not be found "
            f"without its weights: {error}. Keep this block with the data party."
        ) from error


def _map(
    value: Any,
    change: Callable[[Tensor, tuple[int | str, ...]], Tensor],
    cache: Any,
    path: Tree = (),
) -> Any:
    """Rebuild a nested output with `change(tensor, path)` for each tensor and the local cache for a cache."""
    if isinstance(value, Tensor):
        return change(value, path)
    if isinstance(value, dict):
        entries = {key: _map(item, change, cache, (*path, key)) for key, item in value.items()}
        return type(value)(entries)
    if isinstance(value, (tuple, list)):
        items = [_map(item, change, cache, (*path, n)) for n, item in enumerate(value)]
        return _like(value, items)
    return cache if isinstance(value, Cache) else value


def _like(value: Any, items: Iterable[Any]) -> Any:
    """Make a tuple, named tuple or list of the same class."""
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
