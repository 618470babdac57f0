"""What absent modules return: the form of it and the shapes, found without their weights and without data.

A skeleton is run on the meta device; where that cannot be (an expert is chosen by value), with zeros for weights;
in the middle of a generation the form of an earlier call serves. Only shapes are taken from any of them.
"""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from attrs import define, field
from torch import Tensor
from transformers.cache_utils import Cache

from vflair_core.communication.autograd import UNKNOWN
from vflair_core.communication.program import Tree
from vflair_core.errors import PartitionError
from vflair_core.parties.data_party.deferred import Deferred, form_of
from vflair_core.parties.data_party.remote_cache import holds_past
from vflair_core.parties.data_party.shared_states import shadow_of, written

if TYPE_CHECKING:
    from vflair_core.parties.data_party.stubs import ModuleStub

MAX_STRUCTURES = 4096  # remembered shapes; forgetting them costs time only


@define(eq=False)
class Shapes:
    """What each module returns, remembered by the form of its input."""

    _structures: dict[Any, Any] = field(factory=dict)
    _learnt: dict[str, Any] = field(factory=dict)  # of each module the last, and its input's shape

    def of(
        self,
        absent: ModuleStub,
        first: Tensor,
        named: dict[str, Any],
        trees: Sequence[tuple[str, Tree]],
    ) -> Any:
        """What the module returns, with meta tensors for tensors. Learned once per shape of its input, the `first`."""
        hidden = form_of(first)
        literals = tuple([pair for pair in trees if pair[1][0] == "value"])
        key = (absent.name, hidden.shape, hidden.dtype, absent.training, literals)
        if len(self._structures) >= MAX_STRUCTURES:
            self._structures.clear()
        store = [shadow_of(named[name]) for name, tree in trees if tree[0] == "shared"][:1]
        if key not in self._structures:
            before: dict[str, Any] = dict(*store)
            structure = self._learned(absent, named, hidden)
            self._structures[key] = structure, written(dict(*store), before)
        structure, entries = self._structures[key]
        for shadow in store:
            shadow.update(entries)
        return structure

    def _learned(self, absent: ModuleStub, named: dict[str, Any], hidden: Tensor) -> Any:
        """What the module returns, found by running its skeleton, or from what it returned for other lengths."""
        known, shape = self._learnt.get(absent.name, (None, None))

        def resized(tensor: Tensor, _path: Tree) -> Tensor:
            # What had the shape of the input has it again; of anything else the shape is not known now.
            size = hidden.shape if tensor.shape == shape else UNKNOWN
            return torch.empty(size, dtype=tensor.dtype, device="meta")

        try:
            structure = _run_skeleton(absent, named)
        except PartitionError:
            if shape is None:
                raise
            return rebuilt(known, resized, None)
        self._learnt[absent.name] = structure, hidden.shape
        return structure


def first_tensor(named: dict[str, Any]) -> Tensor:
    """The hidden states, which come first in every call."""
    for value in named.values():
        if isinstance(value, Tensor):
            return value
    raise PartitionError("A layer of the model party was called without a tensor.")


def _run_skeleton(absent: ModuleStub, named: dict[str, Any]) -> Any:
    """Run a block on the meta device for its shapes: without cache, and without the mask that fits it."""
    past = next((value for value in named.values() if isinstance(value, Cache)), None)
    has_past = past is not None and holds_past(past, absent.layers)

    def to_meta(value: Any, key: str) -> Any:
        if isinstance(value, Deferred):
            return value.meta
        if isinstance(value, Tensor):
            return None if has_past and "mask" in key else torch.empty_like(value, device="meta")
        if isinstance(value, (tuple, list)):
            return alike(value, [to_meta(item, key) for item in value])
        if isinstance(value, UserDict):
            return shadow_of(value)
        return None if isinstance(value, Cache) else value

    shadow = {key: to_meta(value, key) for key, value in named.items()}
    absent.skeleton.train(absent.training)
    try:
        with torch.no_grad():
            return absent.skeleton(**shadow)
    except Exception:  # noqa: BLE001 - any operation may lack a meta kernel; zeros can be computed with
        arguments = {key: named[key] if shadow[key] is not None else None for key in named}
        return _run_on_zeros(absent, arguments)


def _run_on_zeros(absent: ModuleStub, named: dict[str, Any]) -> Any:
    """Run a block whose shapes depend on values (a router's choice of experts) with zeros for weights."""

    def known(value: Any) -> Any:
        if isinstance(value, Deferred):
            return torch.zeros(value.meta.shape, dtype=value.meta.dtype)
        if isinstance(value, Tensor):
            return value.detach().cpu()
        if isinstance(value, (tuple, list)):
            return alike(value, map(known, value))
        return shadow_of(value) if isinstance(value, UserDict) else value

    try:
        block = copy.deepcopy(absent.skeleton).to_empty(device="cpu")
        with torch.no_grad(), torch.random.fork_rng([]):
            for weight in (*block.parameters(), *block.buffers()):
                weight.zero_()
            answer = block(**{key: known(value) for key, value in named.items()})
        return rebuilt(answer, lambda tensor, _path: tensor.to("meta"), None)
    except Exception as error:
        raise PartitionError(
            f"The shapes that {absent.name} ({type(absent.skeleton).__name__}) returns could not be found "
            f"without its weights: {error}. Keep this block with the data party."
        ) from error


def rebuilt(
    value: Any,
    change: Callable[[Tensor, tuple[int | str, ...]], Tensor],
    cache: Any,
    path: Tree = (),
) -> Any:
    """Rebuild a nested output with `change(tensor, path)` for each tensor and the local cache for a cache."""
    if isinstance(value, Tensor):
        return change(value, path)
    if isinstance(value, dict):
        entries = {key: rebuilt(item, change, cache, (*path, key)) for key, item in value.items()}
        return type(value)(entries)
    if isinstance(value, (tuple, list)):
        items = [rebuilt(item, change, cache, (*path, n)) for n, item in enumerate(value)]
        return alike(value, items)
    return cache if isinstance(value, Cache) else value


def alike(value: Any, items: Iterable[Any]) -> Any:
    """Make a tuple, named tuple or list of the same class."""
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
