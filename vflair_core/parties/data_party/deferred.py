"""Deferred tensors: values inside the model party, of which the data party knows only the shape.

Operations of the program's list are recorded. Anything else needs the value, and fetches it.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.utils.generic import ModelOutput

from vflair_core.communication.program import MIXING, OPERATIONS, Tree, fits
from vflair_core.errors import PartitionError
from vflair_core.parties.data_party.scored_positions import is_a_pick
from vflair_core.partition.partition import SCORED

_OPERATION_NAMES: dict[Any, str] = {
    **{function: name for name, function in OPERATIONS.items()},
    torch.Tensor.__mul__: "mul",
    torch.Tensor.__rmul__: "mul",
    torch.Tensor.__truediv__: "div",
    torch.Tensor.tanh: "tanh",
    torch.mul: "mul",
    torch.Tensor.__add__: "add",
    torch.Tensor.__radd__: "add",
    torch.add: "add",
    torch.div: "div",
    torch.flatten: "flatten",
    torch.split: "split",
    torch.relu: "relu",
}
# Operations that change their first argument, and the one that gives what it becomes.
_IN_PLACE: dict[Any, str] = {
    torch.Tensor.__iadd__: "add",
    torch.Tensor.__imul__: "mul",
    torch.Tensor.add_: "add",
    torch.Tensor.mul_: "mul",
}
# Questions about a deferred tensor that its shape, dtype and device answer.
_FREE = frozenset(
    {
        torch.Tensor.size,
        torch.Tensor.dim,
        torch.Tensor.numel,
        torch.Tensor.is_floating_point,
        torch.Tensor.__len__,
        *(
            getattr(torch.Tensor, name).__get__
            for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "layout")
        ),
    }
)


class Recording(Protocol):
    """What a deferred tensor needs of who records: the recorder."""

    fetched: dict[Tree, Tensor]  # of outputs of the program at hand
    picks: bool  # whether chosen positions may be asked for

    def apply(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], *, picked: str = ""
    ) -> Any:
        """Record an operation."""

    def realise(self, deferred: Deferred) -> Tensor:
        """Fetch a value."""

    def can_send_back(self, deferred: Deferred) -> bool:
        """Whether a value comes of the last module that was called."""

    def is_between_parts(self) -> bool:
        """Whether nothing can be sent back now."""

    def gave_last(self, deferred: Deferred) -> bool:
        """Whether a value is all that the last step gives, and no view."""


class Deferred(Tensor):
    """A tensor inside the model party: shape, dtype and device are known, the value is not."""

    meta: Tensor
    place: torch.device
    recorder: Recording
    node: Tree
    known: dict[Tree, Tensor]  # of the outputs of its program, once the model party gave them

    @staticmethod
    def of(meta: Tensor, device: torch.device, recorder: Recording, node: Tree) -> Deferred:
        deferred: Deferred = Tensor._make_wrapper_subclass(
            Deferred, meta.shape, dtype=meta.dtype, device=device
        )
        deferred.meta, deferred.place = meta, device
        deferred.recorder, deferred.node = recorder, node
        deferred.known = recorder.fetched
        return deferred

    @property
    def fetched(self) -> Tensor | None:
        """The value, if the model party gave it already."""
        return self.known.get(self.node)

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        _types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FREE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        name = _OPERATION_NAMES.get(func)
        first = args[0]
        waiting = isinstance(first, Deferred) and first.fetched is None
        if name is not None and waiting and _are_literal(args[1:], kwargs):
            return first.recorder.apply(name, args, kwargs)
        if name == "getitem" and waiting and first.recorder.picks and is_a_pick(args[1]):
            return first.recorder.apply(name, args, kwargs, picked=SCORED)
        if not kwargs and (mixed := _mixed(func, args)) is not None:
            return mixed
        # A value is needed here, on the data party: fetch it and go on with a real tensor.
        args, kwargs = realised(args), realised(kwargs)
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, _types: Any, _args: Any = (), _kwargs: Any = None
    ) -> Any:
        raise PartitionError(
            f"The model computes {func} on a value that only the model party has. "
            "Move the cut so that this layer is held by one party; `verify` says which cuts work."
        )

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return (
            f"Deferred(shape={tuple(self.meta.shape)}, dtype={self.meta.dtype}, node={self.node})"
        )


def form_of(tensor: Tensor) -> Tensor:
    """A tensor that answers for the shape and dtype of `tensor`; a deferred one would ask torch each time."""
    return tensor.meta if isinstance(tensor, Deferred) else tensor


def device_of(tensor: Tensor) -> torch.device:
    """Where `tensor` lies, likewise."""
    return tensor.place if isinstance(tensor, Deferred) else tensor.device


def _mixed(func: Any, args: tuple[Any, ...]) -> Deferred | None:
    """Record a sum or product with another tensor, if it lies between the parts of a block; None if not."""
    in_place = _IN_PLACE.get(func)
    name = in_place or _OPERATION_NAMES.get(func)
    waiting = [arg for arg in args if isinstance(arg, Deferred) and arg.fetched is None]
    if name not in MIXING or len(args) != 2 or not waiting:
        return None
    recorder = waiting[0].recorder
    if not recorder.is_between_parts() or not all(isinstance(arg, Tensor) for arg in args):
        return None
    if in_place is None:
        first, second = args if fits(args[1], args[0]) else args[::-1]
        return recorder.apply(name, (first, second), {}) if fits(second, first) else None
    first, second = args
    if not (first is waiting[0] and recorder.gave_last(first) and fits(second, first)):
        return None
    first.node = recorder.apply(name, args, {}).node  # all who hold it see what it has become
    return first


def _are_literal(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    literal = (bool, int, float, str, slice, type(None), type(...), torch.dtype)
    flat = [*args, *kwargs.values()]
    flat = [
        item for value in flat for item in (value if isinstance(value, (tuple, list)) else (value,))
    ]
    return all(isinstance(value, literal) for value in flat)


def realised(value: Any, *, possible: bool = False) -> Any:
    """The same with the values of the deferred tensors in it, which are fetched if they were not.

    Those that were passed by, and cannot be sent back any more, are an error; with `possible` they stay deferred, and it
    is an error to use them.
    """
    if isinstance(value, Deferred):
        if possible and value.fetched is None and not value.recorder.can_send_back(value):
            return value
        return value.recorder.realise(value)
    if isinstance(value, (tuple, list)):
        return type(value)(realised(item, possible=possible) for item in value)
    if isinstance(value, dict):
        entries = {key: realised(item, possible=possible) for key, item in value.items()}
        return type(value)(**entries) if isinstance(value, ModelOutput) else entries
    return value
