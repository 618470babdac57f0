"""Messages as bytes: a msgpack header, then the raw little-endian buffers; flags are bits. No pickle, ever.

Everything a header claims is checked before memory is taken for it.
"""

from __future__ import annotations

import math
import sys
from typing import Any, get_args

import msgpack
import numpy as np
import torch

from vflair_core.errors import ProtocolError
from vflair_core.message import Crossing, Kind, Message, Phase, Role

MAGIC = b"vfl1"
MAX_HEADER = 16 * 2**20  # bytes
MAX_TENSORS = 4096
MAX_RANK = 8

DTYPES = {
    name: getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16"),
        *("int64", "int32", "int16", "int8", "uint8", "bool"),
        *("complex64", "complex128"),  # rotary tables of some models
    )
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def encode(message: Message) -> bytes:
    """Write `message` as one frame. Tensors on a GPU are copied to the host."""
    if sys.byteorder != "little":
        raise ProtocolError("The wire format is little-endian and this machine is not.")
    header = {
        "kind": message.kind,
        "session": message.session,
        "step": message.step,
        "exchange": message.exchange,
        "seq": message.seq,
        "phase": message.phase,
        "meta": dict(message.meta),
        "tensors": [
            (crossing.name, crossing.role, _dtype_name(crossing), tuple(crossing.tensor.shape))
            for crossing in message.tensors
        ],
    }
    packed = msgpack.packb(header, use_bin_type=True)
    frame = [MAGIC, len(packed).to_bytes(4, "little"), packed]
    frame += [_to_bytes(crossing.tensor) for crossing in message.tensors]
    return b"".join(frame)


def decode(frame: bytes | memoryview) -> Message:
    """Read one frame.

    Raises:
        ProtocolError: The frame is cut short, has bytes left over, or claims an unknown kind, role, phase
            or dtype, or a shape that does not match its length.
    """
    view = memoryview(frame)
    if bytes(view[:4]) != MAGIC:
        raise ProtocolError("A frame must begin with 'vfl1': the other side speaks something else.")
    size = int.from_bytes(view[4:8], "little")
    if size > MAX_HEADER or 8 + size > len(view):
        raise ProtocolError(f"The header claims {size} bytes of a frame of {len(view)}.")
    try:
        header = msgpack.unpackb(
            view[8 : 8 + size], raw=False, strict_map_key=True, ext_hook=_no_extension
        )
    except (ValueError, msgpack.UnpackException) as error:
        raise ProtocolError(f"The header is not msgpack: {error}") from error
    _check_header(header)
    expected = 8 + size + sum(_size(entry) for entry in header["tensors"])
    if expected != len(view):
        raise ProtocolError(f"The header describes {expected} bytes; the frame has {len(view)}.")
    position, tensors = 8 + size, []
    for entry in header["tensors"]:
        end = position + _size(entry)
        name, role, dtype, shape = entry
        tensors.append(Crossing(name, role, _from_bytes(view[position:end], dtype, shape)))
        position = end
    fields = {key: header[key] for key in ("kind", "session", "step", "exchange", "seq", "phase")}
    return Message(**fields, tensors=tuple(tensors), meta=header["meta"])


def _no_extension(code: int, _data: bytes) -> Any:
    raise ValueError(f"extension type {code}")


def _dtype_name(crossing: Crossing) -> str:
    dtype = crossing.tensor.dtype
    if dtype not in NAMES:
        raise ProtocolError(
            f"Tensor {crossing.name!r} has dtype {dtype}, which cannot cross. "
            f"Possible: {', '.join(DTYPES)}."
        )
    return NAMES[dtype]


def _to_bytes(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.dtype is torch.bool:
        return np.packbits(flat.numpy(), bitorder="little").tobytes()
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def _from_bytes(view: memoryview, dtype: str, shape: list[int]) -> torch.Tensor:
    if not len(view):
        # A product over the sizes other than 0 may still overflow: an empty tensor needs none of them.
        if math.prod(n or 1 for n in shape) >= 2**40:
            raise ProtocolError(f"{shape!r} is not a shape an empty tensor needs.")
        return torch.empty(shape, dtype=DTYPES[dtype])
    data = np.frombuffer(view, dtype=np.uint8)
    if dtype == "bool":
        flags = np.unpackbits(data, bitorder="little")
        count = math.prod(shape)
        if flags[count:].any():
            raise ProtocolError("The bits after the last flag of a bool tensor must be 0.")
        return torch.tensor(flags[:count].view(np.bool_)).reshape(shape)
    # Memory of torch's own, and no view: it may be changed in place, and its alignment is what kernels expect.
    tensor = torch.empty(shape, dtype=DTYPES[dtype])
    tensor.reshape(-1).view(torch.uint8).numpy()[:] = data
    return tensor


def _size(entry: Any) -> int:
    _, _, dtype, shape = entry
    count: int = math.prod(shape)
    return -(-count // 8) if dtype == "bool" else count * DTYPES[dtype].itemsize


def _check_header(header: Any) -> None:
    keys = {"kind", "session", "step", "exchange", "seq", "phase", "meta", "tensors"}
    if not isinstance(header, dict) or set(header) != keys:
        raise ProtocolError(f"A header must be a map with the keys {', '.join(sorted(keys))}.")
    for key, possible in (("kind", get_args(Kind)), ("phase", get_args(Phase))):
        if header[key] not in possible:
            raise ProtocolError(f"Unknown {key} {header[key]!r}. Possible: {', '.join(possible)}.")
    for key in ("step", "exchange", "seq"):
        if not isinstance(header[key], int) or isinstance(header[key], bool) or header[key] < 0:
            raise ProtocolError(f"{key} must be a whole number >= 0, not {header[key]!r}.")
    if not isinstance(header["session"], str) or not isinstance(header["meta"], dict):
        raise ProtocolError("session must be text and meta a map.")
    if not isinstance(header["tensors"], list) or len(header["tensors"]) > MAX_TENSORS:
        raise ProtocolError(f"tensors must be a list of at most {MAX_TENSORS}.")
    for entry in header["tensors"]:
        _check_entry(entry)


def _check_entry(entry: Any) -> None:
    match entry:
        case [str(), str() as role, str() as dtype, list() as shape]:
            if role not in get_args(Role):
                raise ProtocolError(
                    f"Unknown role {role!r}. Possible: {', '.join(get_args(Role))}."
                )
            if dtype not in DTYPES:
                raise ProtocolError(f"Unknown dtype {dtype!r}. Possible: {', '.join(DTYPES)}.")
            if len(shape) > MAX_RANK or not all(type(n) is int and 0 <= n < 2**31 for n in shape):
                raise ProtocolError(f"{shape!r} is not a shape of at most {MAX_RANK} dimensions.")
        case _:
            raise ProtocolError(
                f"A tensor entry must be (name, role, dtype, shape), not {entry!r}."
            )
