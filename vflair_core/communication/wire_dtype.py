"""Wire dtypes: hidden states and their gradients rounded for the way, and what the rounding does to them.

``float32`` rounds nothing: every tensor crosses as it is, whatever its dtype. ``bfloat16`` keeps the 8 leading bits of each
mantissa. ``int8`` writes each row (of the last dimension) as whole numbers from -127 to 127 times one float32 scale, which
is the row's largest magnitude / 127: no number of it moves by more than half a scale, and rows of zeros stay zeros. A row
with numbers that are not finite has the sign bit of its scale set, its finite numbers lie between -126 and 126, and -128 is
NaN, -127 and 127 are the infinities. Numbers that float32 cannot hold are infinite.

Only what is made of hidden states is rounded, and only where its dtype is wider; all else crosses as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from vflair_core.errors import ProtocolError, alternatives

WireDtype = Literal["float32", "bfloat16", "int8"]
WIRE_DTYPES: tuple[WireDtype, ...] = get_args(WireDtype)
ROUNDED = frozenset({"smashed", "returned", "hidden_grad", "smashed_grad"})  # roles
_BYTES = {"bfloat16": 2, "int8": 1}  # of a number
_SCALE = 4  # bytes
_TOP = 127.0
_TOP_BESIDE_INFINITY = 126.0
_NAN = -128


def check_wire_dtype(asked: str) -> WireDtype:
    """Return `asked`, which must be a wire dtype.

    Raises:
        ProtocolError: It is none.
    """
    for possible in WIRE_DTYPES:
        if asked == possible:
            return possible
    raise ProtocolError(f"There is no wire dtype {asked!r}.{alternatives(asked, WIRE_DTYPES)}")


def is_rounded(role: str, dtype: torch.dtype, wire_dtype: WireDtype) -> bool:
    """Whether a tensor of this role and dtype crosses rounded to `wire_dtype`."""
    if wire_dtype == "float32":
        return False
    wider = dtype.is_floating_point and dtype.itemsize > _BYTES[wire_dtype]
    return wider and role in ROUNDED


def rounded_size(shape: Sequence[int], wire_dtype: WireDtype) -> int:
    """Bytes that a rounded tensor of this shape takes."""
    count: int = math.prod(shape)
    return count * _BYTES[wire_dtype] + (_SCALE * _rows(shape) if wire_dtype == "int8" else 0)


def rounded(tensor: Tensor, wire_dtype: WireDtype) -> Tensor:
    """Write a tensor as the bytes that cross: the scales of all rows first, then the numbers."""
    flat = tensor.detach().contiguous()
    if not flat.numel():
        return flat.new_empty(0, dtype=torch.uint8)
    if wire_dtype == "bfloat16":
        return flat.to(torch.bfloat16).reshape(-1).view(torch.uint8)
    rows = flat.float().reshape(_rows(flat.shape), -1)
    scales, numbers = _quantised(rows)
    return torch.cat([scales.view(torch.uint8), numbers.reshape(-1).view(torch.uint8)])


def restored(
    payload: Tensor, shape: Sequence[int], dtype: torch.dtype, wire_dtype: WireDtype
) -> Tensor:
    """Read what `rounded` wrote.

    Raises:
        ProtocolError: A scale is not finite, or a row holds a number that `rounded` would not have written.
    """
    if not payload.numel():
        return payload.new_empty(tuple(shape), dtype=dtype)
    if wire_dtype == "bfloat16":
        return payload.view(torch.bfloat16).to(dtype).reshape(tuple(shape))
    head = _SCALE * _rows(shape)
    scales = payload[:head].view(torch.float32)
    numbers = payload[head:].view(torch.int8).reshape(len(scales), -1)
    if not scales.isfinite().all():
        raise ProtocolError("The scale of a row must be finite.")
    odd = torch.signbit(scales)
    if (numbers[~odd] == _NAN).any():
        raise ProtocolError(f"A row whose scale is not negative cannot hold {_NAN}.")
    values = numbers.float().mul_(scales.abs()[:, None])
    if odd.any():
        values[odd] = _with_infinities(numbers[odd], values[odd])
    return values.to(dtype).reshape(tuple(shape))


def _rows(shape: Sequence[int]) -> int:
    """Rows that have a scale: none of a tensor without numbers, one of a single number."""
    return (
        math.prod(shape) // shape[-1]
        if len(shape) and math.prod(shape)
        else min(1, math.prod(shape))
    )


def _quantised(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Scales (R,) and whole numbers (R, D) of rows (R, D) of float32."""
    largest = rows.abs().amax(dim=1)
    odd = ~largest.isfinite()
    if not odd.any():
        scales = _scales(largest, _TOP)
        return scales, _whole(rows, scales, _TOP)
    finite = torch.where(rows.isfinite(), rows, 0.0)
    top = torch.where(odd, _TOP_BESIDE_INFINITY, _TOP)
    scales = _scales(finite.abs().amax(dim=1), top)
    numbers = torch.minimum(_whole(finite, scales, _TOP), top[:, None].to(torch.int8))
    numbers = torch.maximum(numbers, -top[:, None].to(torch.int8))
    numbers = torch.where(rows == math.inf, int(_TOP), numbers)
    numbers = torch.where(rows == -math.inf, -int(_TOP), numbers)
    numbers = torch.where(rows.isnan(), _NAN, numbers)
    return torch.where(odd, -scales, scales), numbers.to(torch.int8)


def _scales(largest: Tensor, top: float | Tensor) -> Tensor:
    scales = largest / top
    over = (scales * top).isinf()  # the largest float32 / 127 was rounded up
    return torch.where(over, torch.nextafter(scales, torch.zeros_like(scales)), scales)


def _whole(rows: Tensor, scales: Tensor, top: float) -> Tensor:
    """Rows in units of their scales; 0 where a scale is 0, for then all of the row is next to nothing."""
    units = torch.where(scales > 0, scales, math.inf)
    return (rows / units[:, None]).round_().clamp_(-top, top).to(torch.int8)


def _with_infinities(numbers: Tensor, values: Tensor) -> Tensor:
    values = torch.where(numbers == int(_TOP), math.inf, values)
    values = torch.where(numbers == -int(_TOP), -math.inf, values)
    return torch.where(numbers == _NAN, math.nan, values)
