"""Deferred tensors: values inside the model party, of which the data party knows only the shape.

Operations of the program's list are recorded. Anything else needs the value, and fetches it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vflair_core.errors import PartitionError
from vflair_core.program import OPERATIONS, Tree

if TYPE_CHECKING:
    from vflair_core.recorder import Recorder

_OPERATION_NAMES: dict[Any, str] = {
    **{function: name for name, function in OPERATIONS.items()},
    torch.Tensor.__mul__: "mul",
    torch.Tensor.__rmul__: "mul",
    torch.Tensor.__truediv__: "div",
    torch.Tensor.tanh: "tanh",
    torch.mul: "mul",
    torch.div: "div",
    torch.flatten: "flatten",
    torch.split: "split",
    torch.relu: "relu",
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


class Deferred(Tensor):
    """A tensor inside the model party: shape, dtype and device are known, the value is not."""

    meta: Tensor
    recorder: Recorder
    node: Tree

    @staticmethod
    def of(meta: Tensor, device: torch.device, recorder: Recorder, node: Tree) -> Deferred:
        deferred: Deferred = Tensor._make_wrapper_subclass(
            Deferred, meta.shape, dtype=meta.dtype, device=device
        )
        deferred.meta, deferred.recorder, deferred.node = meta, recorder, node
        return deferred

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
        if name is not None and isinstance(args[0], Deferred) and _are_literal(args[1:], kwargs):
            return args[0].recorder.apply(name, args, kwargs)
        # A value is needed here, on the data party: fetch it and go on with a real tensor.
        args, kwargs = _realised(args), _realised(kwargs)
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


def _are_literal(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    literal = (bool, int, float, str, slice, type(None), type(...), torch.dtype)
    flat = [*args, *kwargs.values()]
    flat = [
        item for value in flat for item in (value if isinstance(value, (tuple, list)) else (value,))
    ]
    return all(isinstance(value, literal) for value in flat)


def _realised(value: Any) -> Any:
    if isinstance(value, Deferred):
        return value.recorder.realise(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_realised(item) for item in value)
    if isinstance(value, dict):
        return {key: _realised(item) for key, item in value.items()}
    return value
