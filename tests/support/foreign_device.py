"""A device that is not there: tensors that say they are on CUDA, compute on the CPU, and refuse what CUDA refuses.

    with foreign_device() as device:
        head(ids.to(device))  # after halves(model, partition, device): real values
        head(ids)  # raises MixedDevicesError

To torch's C++ such a tensor is on "lazy", a device without kernels, so that nothing takes a short cut past us; to
Python it is on "cuda:0". As on CUDA, a CPU tensor may meet it as a number (without dimensions, elementwise), as an index
and in copies, and a generator of the CPU draws nothing there. What is drawn without a generator is the CPU's stream,
which on CUDA it is not. It does not notice a gradient that was handed to autograd from elsewhere, nor an operation that
CUDA lacks or computes otherwise.
"""

from __future__ import annotations

from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

SHOWN, OWN, CPU = torch.device("cuda:0"), torch.device("lazy:0"), torch.device("cpu")
ops = torch.ops.aten
COPIES = {ops._to_copy, ops.copy_, ops.copy}
INDEXING = {ops.index, ops.index_put, ops.index_put_, ops._index_put_impl_, ops._unsafe_index}
FILLING = {ops.masked_fill, ops.masked_fill_}  # with a number
# Sizes of packed batches are on the CPU, before and after: which argument of each operation they are.
SIZES = {ops._pack_padded_sequence: 1, ops._pack_padded_sequence_backward: 2}


class MixedDevicesError(RuntimeError):
    """What CUDA would have raised."""


class Foreign(torch.Tensor):
    """A tensor "on CUDA"; its values are in `inner`, on the CPU."""

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=OWN, **layout
        )
        made.inner = inner
        return made

    @property
    def device(self):
        return SHOWN

    @property
    def data(self):
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, value):
        assert isinstance(value, Foreign)
        assert value.shape == self.shape
        self.inner = value.inner

    def tolist(self):
        return self.inner.tolist()

    def __deepcopy__(self, memo):
        copied = self.detach().clone().requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copied._is_param = True
        return memo.setdefault(id(self), copied)

    def __repr__(self, **_):
        return f"Foreign({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return _compute(operation, args, kwargs or {})


@contextmanager
def foreign_device():
    """While this lasts "cuda:0" is a device, and is yielded; modules can be moved there."""
    move = nn.Module._apply

    def move_tied(module, *args, **kwargs):
        """Weights that are tied stay so, as they do on CUDA."""
        before = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            return move(module, *args, **kwargs)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(before)

    engine = torch.autograd._engine_run_backward

    def go_back(*args, **kwargs):
        """Torch turns the mode that handles a backward off; what runs in it finds the names all the same."""
        with _Names():
            return engine(*args, **kwargs)

    with (
        mock.patch.object(nn.Module, "_apply", move_tied),
        mock.patch.object(torch.autograd, "_engine_run_backward", go_back),
        _Factories(),
        _Names(),
    ):
        yield SHOWN


class _Names(TorchFunctionMode):
    """Who asks torch for CUDA by its name means this device."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.to:
            args = (args[0], *map(_named, args[1:]))
        if "device" in kwargs:
            kwargs["device"] = _named(kwargs["device"])
        if function is torch.tensor and kwargs.get("device") == OWN:
            made = torch.tensor(*args, **{**kwargs, "device": CPU, "requires_grad": False})
            return made.to(OWN).requires_grad_(kwargs.get("requires_grad", False))
        if function in {torch.Tensor.__getitem__, torch.Tensor.__setitem__}:
            args = (args[0], tree_map(_listed, args[1], is_leaf=_is_list), *args[2:])
        return function(*args, **kwargs)


def _named(device):
    by_name = isinstance(device, (str, torch.device)) and str(device).startswith("cuda")
    return OWN if by_name else device


def _is_list(index):
    return isinstance(index, list)


def _listed(index):
    """Torch's C++ would make a tensor of a list of numbers on the device, behind our back."""
    return torch.tensor(index) if _is_list(index) else index


class _Factories(TorchDispatchMode):
    """Catches what is made on the device, or moved there, of nothing that was there before."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return _compute(operation, args, kwargs or {})


def _compute(operation, args, kwargs):
    """Compute on the CPU, and let the outcome be where it would have been."""
    asked = kwargs.get("device")
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    foreign = any(isinstance(tensor, Foreign) for tensor in tensors)
    there = foreign if asked is None else asked.type == OWN.type
    if not foreign and not there:
        return operation(*args, **kwargs)
    if kwargs.get("generator") is not None:
        raise MixedDevicesError(f"{operation} on cuda:0 was given a generator of the CPU.")
    sizes = SIZES.get(operation.overloadpacket)
    if sizes is not None and isinstance(args[sizes], Foreign):
        raise MixedDevicesError(f"{operation} needs the sizes of packed rows on the CPU.")
    if not all(isinstance(tensor, Foreign) for tensor in tensors):
        _refuse(operation, args, kwargs)
    if there and asked is not None:
        kwargs = {**kwargs, "device": CPU, "pin_memory": None}
    outputs = operation(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    if not there:
        return outputs
    if operation.overloadpacket in {ops._pack_padded_sequence, ops._pad_packed_sequence}:
        return (Foreign(outputs[0]), outputs[1])
    return return_and_correct_aliasing(operation, args, kwargs, tree_map(_wrapped, outputs))


def _refuse(operation, args, kwargs):
    """Raise where CUDA would, of an operation on tensors that are not all there."""
    packet = operation.overloadpacket
    if packet in COPIES:
        return
    if packet in INDEXING and isinstance(args[0], Foreign):
        args = (args[0], *args[2:])
    if packet in SIZES:
        args = (*args[: SIZES[packet]], *args[SIZES[packet] + 1 :])
    numbers = torch.Tag.pointwise in operation.tags or packet in INDEXING | FILLING
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    for tensor in tensors:
        if not isinstance(tensor, Foreign) and (tensor.dim() or not numbers):
            raise MixedDevicesError(
                f"{operation} needs its tensors in one place; they are on "
                f"{', '.join(f'{t.device} {tuple(t.shape)}' for t in tensors)}."
            )


def _inner(value):
    return value.inner if isinstance(value, Foreign) else value


def _wrapped(value):
    there = isinstance(value, torch.Tensor) and value.device == CPU
    return Foreign(value) if there else value


# -- for tests that run on this device, and on a real one where there is one --------------------------------

DEVICES = [
    "foreign",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
        ],
    ),
]


@contextmanager
def device_called(name):
    """The device of that name in `DEVICES`."""
    if name == "foreign":
        with foreign_device() as device:
            yield device
    else:
        yield torch.device(name)


def same_attention():
    """The one way to compute attention that every device has."""
    return sdpa_kernel(SDPBackend.MATH)
