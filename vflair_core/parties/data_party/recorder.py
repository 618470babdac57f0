"""The recorder: writes down the calls of absent modules until a program is complete, then hands it over.

When the last absent module is called, or when a value is needed before that, the recorded program goes
to `model_calls.py` and real tensors come back. Nothing here knows a model family.
"""

from __future__ import annotations

from collections import Counter, UserDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from attrs import define, field
from torch import Tensor
from transformers.cache_utils import Cache

from vflair_core.communication.codec import NAMES
from vflair_core.communication.execution import Execution
from vflair_core.communication.program import (
    MIXING,
    OPERATIONS,
    RESHAPING,
    Leaf,
    Program,
    Step,
    Tree,
    sources,
    tensors_of,
)
from vflair_core.errors import PartitionError, ProtocolError
from vflair_core.parties.data_party.deferred import Deferred, device_of
from vflair_core.parties.data_party.shape_inference import Shapes, first_tensor, rebuilt
from vflair_core.parties.data_party.shared_states import coming_back, fill, open_store
from vflair_core.parties.data_party.stubs import ModuleStub, named_arguments
from vflair_core.partition.stages import Stage, stage_of

# Hands a program, the tensors it takes, the cache and the form of the answer (meta tensors) to who exchanges them;
# returns the answer's tensors.
Handover = Callable[[Program, list[Tensor], "Cache | None", list[Tensor]], list[Tensor]]

_LITERALS = frozenset({type(None), bool, int, float, str})


@define(eq=False)
class Recorder:
    """Writes down the calls of absent modules until a program is complete, then hands it over."""

    handover: Handover
    stages: tuple[Stage, ...]  # what the model party runs at a time: a program is one of them
    picks: bool  # whether chosen positions may be asked for: which they are crosses
    absent: dict[str, ModuleStub] = field(factory=dict)  # the stubs that record here
    steps: list[Step] = field(factory=list)
    tensors: list[Tensor] = field(factory=list)
    leaves: list[Leaf] = field(factory=list)
    cache: Cache | None = None
    only_first: bool = False  # whether what the first absent module is given is all that is wanted
    calls: Counter[str] = field(
        factory=Counter
    )  # of shared blocks, since the model was last called
    _called: list[str] = field(factory=list)  # modules of the program so far
    fetched: dict[Tree, Tensor] = field(
        factory=dict
    )  # of outputs of this program that were fetched
    _returned: Any = None  # the form of what the last module gives
    _known: dict[int, Tree] = field(factory=dict)  # by the id of what has this tree
    _held: list[Any] = field(factory=list)  # these, so that no id is used again
    _store: UserDict[str, Any] | None = None  # that the blocks of this program share
    _versions: list[int] = field(factory=list)  # of `tensors`, as they were when they were taken
    _shapes: Shapes = field(factory=Shapes)

    def begin(self) -> None:
        """Make ready for a new call of the model."""
        self.reset()
        self.calls.clear()

    def reset(self) -> None:
        """Forget what was recorded."""
        self.steps, self.tensors, self.leaves, self.cache = [], [], [], None
        self._known, self._called, self.fetched, self._returned = {}, [], {}, None
        self._versions, self._store, self._held = [], None, []

    def call(self, absent: ModuleStub, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record the call of an absent module."""
        named = named_arguments(absent, args, kwargs)
        hidden = first_tensor(named)
        waits = _waits(hidden) or _waits(named)
        if not waits and any(stage.allows(tuple(self._called)) for stage in self.stages):
            self._fetch()  # what was recorded does not feed this module: it is asked for alone
        trees = tuple([(key, self._tree(value, key)) for key, value in named.items()])
        self.steps.append(("module", absent.name, (), trees))
        self._called.append(absent.name)
        if self.only_first:
            self._fire([])
        structure = self._shapes.of(absent, hidden, named, trees)
        if self._is_complete():
            shapes = tensors_of(structure)
            answer = self._fire(shapes)
            real = iter(answer)
            return rebuilt(structure, lambda _meta, _path: next(real), _cache_in(named))
        self._returned = structure
        if isinstance(structure, Tensor):  # most blocks give nothing else
            return self._deferred(structure, device_of(hidden))
        return self._deferred(structure, device_of(hidden), _cache_in(named))

    def _deferred(self, shapes: Any, device: torch.device, cache: Cache | None = None) -> Any:
        """What the last step will give."""
        step = len(self.steps) - 1
        return rebuilt(
            shapes, lambda meta, path: Deferred.of(meta, device, self, ("out", step, *path)), cache
        )

    def _is_complete(self) -> bool:
        called = tuple(self._called)
        return any(stage.ends_with(called) for stage in self.stages)

    def apply(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], *, picked: str = ""
    ) -> Any:
        """Record an operation of the list on a deferred tensor; a list of positions it takes is sent as `picked`."""
        shapes = OPERATIONS[name](*map(_on_meta, args), **kwargs)
        if name in RESHAPING and shapes.shape == args[0].shape:
            return args[0]  # nothing is done, and the program of another length is the same
        if picked:
            for part in args[1]:
                if isinstance(part, Tensor):
                    self._leaf(part, picked)
        trees = tuple(self._tree(value, name) for value in args)
        named = tuple((key, self._tree(value, name)) for key, value in kwargs.items())
        self.steps.append(("op", name, trees, named))
        return self._deferred(shapes, device_of(args[0]))

    def layers(self, names: Sequence[str]) -> frozenset[int]:
        """Numbers of the cache layers that the modules `names` fill."""
        return frozenset().union(*[self.absent[name].layers for name in names])

    def is_between_parts(self) -> bool:
        """Whether the model party has still blocks to run, so that nothing can be sent back now."""
        called = tuple(self._called)
        return any(stage.goes_on_after(called) for stage in self.stages)

    def gave_last(self, deferred: Deferred) -> bool:
        """Whether `deferred` is all that the last step gives and no view of anything: then no other value shares it."""
        kind, name, *_ = self.steps[-1]
        last = deferred.node == ("out", len(self.steps) - 1) and deferred.known is self.fetched
        return last and (kind == "module" or name in MIXING)

    def can_send_back(self, deferred: Deferred) -> bool:
        """Whether the value of a deferred tensor comes of the last module that was called, whose output can be asked for."""
        calls = [number for number, step in enumerate(self.steps) if step[0] == "module"]
        return deferred.known is self.fetched and bool(calls) and deferred.node[1] >= calls[-1]

    def realise(self, deferred: Deferred) -> Tensor:
        """Fetch the value of a deferred tensor before the program is complete; it has it from then on.

        What the last module gave is sent back, and the operations recorded since are done here: the model may need
        what they started from as well.
        """
        if deferred.fetched is None and deferred.known is self.fetched:
            self._fetch()
        if deferred.fetched is None:
            raise PartitionError(
                "The model needs a value from the middle of the model party's layers: the output of "
                f"step {deferred.node[1]} after {self._called[-1] if self._called else 'the exchange'}. Choose a cut "
                "after that layer; `verify` says which cuts work."
            )
        return deferred.fetched

    def _fetch(self) -> None:
        """Ask for the steps so far, and note the value of everything that came of the last module."""
        stage_of(tuple(self._called), self.stages)
        calls = [number for number, step in enumerate(self.steps) if step[0] == "module"]
        last, steps, known, tensors = calls[-1], self.steps, self.fetched, self.tensors
        returned, self.steps = self._returned, steps[: last + 1]
        answer = iter(self._fire(tensors_of(returned)))
        outputs: dict[int, Any] = {last: rebuilt(returned, lambda *_: next(answer), None)}
        work = Execution(_no_module, tensors)
        for number, step in enumerate(steps[last + 1 :], last + 1):
            if min(sources(step)) >= last:
                outputs[number] = work.step(step, outputs)
        for number, output in outputs.items():

            def note(tensor: Tensor, path: Tree, number: int = number) -> Tensor:
                return known.setdefault(("out", number, *path), tensor)

            rebuilt(output, note, None)

    def _fire(self, shapes: list[Tensor]) -> list[Tensor]:
        for tensor, version, (name, *_) in zip(
            self.tensors, self._versions, self.leaves, strict=True
        ):
            if _version(tensor) != version:
                raise PartitionError(
                    f"The model changed {name!r} in place after a layer of the model party had taken it. Choose a cut "
                    "at which this layer stays with the data party."
                )
        # Blocks of the data party that follow may read what those of the model party put in.
        store = None if any(stage.rest for stage in self.stages) else self._store
        shapes = [*shapes, *coming_back(store)]
        program = Program(tuple(self.steps), tuple(self.leaves), bool(coming_back(store)))
        tensors, cache = self.tensors, self.cache
        self.reset()
        answer = self.handover(program, tensors, cache, shapes)
        if len(answer) != len(shapes):
            raise ProtocolError(
                f"{program.modules[-1]} returns {len(shapes)} tensors; {len(answer)} came back."
            )
        rest = len(shapes) - len(coming_back(store))
        fill(store, iter(answer[rest:]))
        return answer[:rest]

    def _tree(self, value: Any, name: str) -> Tree:
        if type(value) in _LITERALS:  # asked first, with what was met before: it is all but a few
            return "value", value
        if (known := self._known.get(id(value))) is not None:
            return known
        match value:
            case Deferred(fetched=Tensor() as fetched):
                return self._leaf(fetched, name)
            case Deferred():
                if value.known is not self.fetched:
                    raise PartitionError(
                        f"Argument {name!r} uses a value from inside the model party that was not sent back."
                    )
                return value.node
            case Tensor():
                return self._leaf(value, name)
            case None | bool() | int() | float() | str():
                return "value", value
            case Cache():
                self.cache = value
                return ("cache",)
            case tuple() | list():
                items = [self._tree(item, f"{name}.{n}") for n, item in enumerate(value)]
                if isinstance(value, list):
                    return ("list", *items)
                tree = ("tuple", *items)
                # Nothing can be put into it, and a leaf stays one.
                settled = all(item[0] == "leaf" for item in items)
                return self._settled(value, tree) if settled else tree
            case dict():
                return (
                    "dict",
                    *((key, self._tree(item, f"{name}.{key}")) for key, item in value.items()),
                )
            case UserDict() if self._store is None:
                self._store = value
                entries = open_store(value)
                return (
                    "shared",
                    *((key, self._tree(item, f"{name}.{key}")) for key, item in entries.items()),
                )
            case UserDict() if value is self._store:
                return ("shared",)
            case slice():
                return "slice", value.start, value.stop, value.step
            case torch.dtype():
                return "dtype", NAMES[value]
            case _ if value is Ellipsis:
                return ("ellipsis",)
            case _:
                raise PartitionError(
                    f"Argument {name!r} is a {type(value).__name__}, which cannot cross. Tensors, numbers, "
                    "texts and caches can."
                )

    def _leaf(self, tensor: Tensor, name: str) -> Tree:
        if (known := self._known.get(id(tensor))) is not None:
            return known
        tree = "leaf", len(self.tensors)
        self.tensors.append(tensor)
        self._versions.append(_version(tensor))
        self.leaves.append((name, NAMES[tensor.dtype], tensor.dim()))
        return self._settled(tensor, tree)

    def _settled(self, value: Any, tree: Tree) -> Tree:
        """Remember the tree of `value`, which is the same wherever this program takes it."""
        self._known[id(value)] = tree
        self._held.append(value)
        return tree


def _cache_in(named: dict[str, Any]) -> Cache | None:
    return next((value for value in named.values() if isinstance(value, Cache)), None)


def _waits(value: Any) -> bool:
    """Whether `value` is, or holds, a deferred tensor that was not fetched."""
    if isinstance(value, Deferred):
        return value.fetched is None
    if isinstance(value, dict):
        return any(map(_waits, value.values()))
    return isinstance(value, (tuple, list)) and any(map(_waits, value))


def _version(tensor: Tensor) -> int:
    """How often `tensor` was changed in place; those of inference mode do not count."""
    return 0 if tensor.is_inference() else tensor._version


def _on_meta(value: Any) -> Any:
    if isinstance(value, Deferred):
        return value.meta
    if isinstance(value, tuple):
        return tuple(map(_on_meta, value))
    return torch.empty_like(value, device="meta") if isinstance(value, Tensor) else value


def _no_module(name: str, *_: Any) -> Any:
    raise ProtocolError(f"{name} is held by the model party.")
