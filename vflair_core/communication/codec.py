"""Messages as bytes: a msgpack header, then the raw little-endian buffers; flags are bits. No pickle, ever.

Everything a header claims is checked before memory is taken for it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, get_args

import msgpack
import numpy as np
import torch
from attrs import define

from vflair_core.communication.header_limits import MAX_HEADER, check_packed
from vflair_core.communication.message import Crossing, Kind, Message, Phase, Role
from vflair_core.communication.wire_dtype import (
    WIRE_DTYPES,
    WireDtype,
    is_rounded,
    restored,
    rounded,
    rounded_size,
)
from vflair_core.errors import ProtocolError, shown

MAGIC = b"vfl1"
MAX_TENSORS = 4096
MAX_NAME = 256  # characters of a tensor's
MAX_SESSION = 128  # characters of a session's
MAX_NUMBER = 2**63 - 1
MAX_FLAGS = 2**31  # of one message: they come as bits, and take a byte each
MAX_RANK = 8
CHUNK = 2**20  # bytes of one piece of a message
MOST = 2**34  # bytes of one message

DTYPES = {
    name: getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16"),
        *("int64", "int32", "int16", "int8", "uint8", "bool"),
        *("complex64", "complex128"),  # rotary tables of some models
    )
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ROUNDING = [[name] for name in WIRE_DTYPES if name != "float32"]


def encode(message: Message) -> bytes:
    """Write `message` as one frame. Tensors on a GPU are copied to the host.

    Raises:
        ProtocolError: `decode` would refuse it.
    """
    return b"".join(chunks(message))


def decode(frame: bytes | memoryview) -> Message:
    """Read one frame.

    Raises:
        ProtocolError: The frame is cut short, has bytes left over, or claims an unknown kind, role, phase
            or dtype, or a shape that does not match its length.
    """
    return read([memoryview(frame)], most=len(frame))


def chunks(message: Message, size: int = CHUNK) -> Iterator[bytes | memoryview]:
    """Write `message` piece by piece, so that large logits are never copied as a whole.

    The first piece is the header; the others are views of the tensors' own memory, of at most `size` bytes.

    Raises:
        ProtocolError: `read` would refuse it; then there is no first piece.
    """
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
            (
                *(crossing.name, crossing.role, _dtype_name(crossing)),
                tuple(crossing.tensor.shape),
                *(() if crossing.wire_dtype == "float32" else (crossing.wire_dtype,)),
            )
            for crossing in message.tensors
        ],
    }
    try:
        packed: bytes = msgpack.packb(header, use_bin_type=True)
    except (OverflowError, TypeError, ValueError) as error:
        raise ProtocolError(
            f"This {message.kind!r} has a fact that cannot cross: {error}. Plain lists, maps, texts and numbers can."
        ) from error
    _unpacked(packed)  # sees now what the other side would refuse
    yield MAGIC + len(packed).to_bytes(4, "little") + packed
    for crossing in message.tensors:
        view = _view(crossing)
        for start in range(0, len(view), size):
            yield view[start : start + size]


def read(
    pieces: Iterable[bytes | memoryview], *, most: int = MOST, wire_dtype: WireDtype = "float32"
) -> Message:
    """Read the pieces of one message, which may be cut anywhere, into tensors of their final size.

    Args:
        pieces: In their order.
        most: Bytes that a message may have; a header that claims more is refused before memory is taken.
        wire_dtype: What the parties agreed to round to; a tensor that crosses in another way is refused.

    Raises:
        ProtocolError: As `decode`; or the message is larger than `most`, or rounded otherwise than agreed.
    """
    stream = _Stream(iter(pieces))
    if stream.take(4) != MAGIC:
        raise ProtocolError("A frame must begin with 'vfl1': the other side speaks something else.")
    size = int.from_bytes(stream.take(4), "little")
    if size > min(MAX_HEADER, most - 8):
        raise ProtocolError(f"The header claims {size} bytes of a frame of {most}.")
    packed = stream.take(size)
    header = _unpacked(packed)
    expected = 8 + size + sum(_size(entry) for entry in header["tensors"])
    if expected > most:
        raise ProtocolError(f"The header describes {shown(expected)} bytes; the frame has {most}.")
    for entry in header["tensors"]:
        _check_rounding(entry, wire_dtype)
    try:
        tensors = [_crossing(stream, *entry) for entry in header["tensors"]]
    except (MemoryError, RuntimeError) as error:
        raise ProtocolError(f"There is no memory for the {expected} bytes of a message.") from error
    if left := stream.rest():
        raise ProtocolError(f"The header describes {expected} bytes; the frame has {left} more.")
    fields = {key: header[key] for key in ("kind", "session", "step", "exchange", "seq", "phase")}
    return Message(**fields, tensors=tuple(tensors), meta=header["meta"])


@define
class _Stream:
    """Bytes that come in pieces, taken in other pieces."""

    pieces: Iterator[bytes | memoryview]
    piece: memoryview = memoryview(b"")

    def fill(self, target: memoryview) -> None:
        """Fill `target` with the next bytes."""
        done = 0
        while done < len(target):
            if not len(self.piece):
                self.piece = memoryview(self._next(done, len(target))).cast("B")
            count = min(len(self.piece), len(target) - done)
            target[done : done + count] = self.piece[:count]
            self.piece, done = self.piece[count:], done + count

    def _next(self, done: int, wanted: int) -> bytes | memoryview:
        for piece in self.pieces:
            return piece
        raise ProtocolError(
            f"A frame ended after {done} of {wanted} bytes that its header describes."
        )

    def take(self, count: int) -> bytes:
        """Return the next bytes, of which there cannot be many: memory is taken as they come."""
        taken = bytearray()
        while len(taken) < count:
            part = bytearray(min(count - len(taken), CHUNK))
            self.fill(memoryview(part))
            taken += part
        return bytes(taken)

    def rest(self) -> int:
        """Count the bytes that are left."""
        return len(self.piece) + sum(len(piece) for piece in self.pieces)


def _dtype_name(crossing: Crossing) -> str:
    dtype = crossing.tensor.dtype
    if dtype not in NAMES:
        raise ProtocolError(
            f"Tensor {shown(crossing.name)} has dtype {dtype}, which cannot cross. "
            f"Possible: {', '.join(DTYPES)}."
        )
    return NAMES[dtype]


def _view(crossing: Crossing) -> memoryview:
    tensor = crossing.tensor
    if crossing.wire_dtype != "float32":
        tensor = rounded(tensor, crossing.wire_dtype)
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.dtype is torch.bool:
        return np.packbits(flat.numpy(), bitorder="little").data
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _crossing(  # as its entry says
    stream: _Stream,
    name: str,
    role: Role,
    dtype: str,
    shape: list[int],
    wire_dtype: WireDtype = "float32",
) -> Crossing:
    if wire_dtype == "float32":
        return Crossing(
            name, role, _received(stream, dtype, shape, _size((name, role, dtype, shape)))
        )
    payload = _received(stream, "uint8", [size := rounded_size(shape, wire_dtype)], size)
    tensor = restored(payload, shape, DTYPES[dtype], wire_dtype)
    return Crossing(name, role, tensor, wire_dtype=wire_dtype)


def _received(stream: _Stream, dtype: str, shape: list[int], size: int) -> torch.Tensor:
    if not size:
        # A product over the sizes other than 0 may still overflow: an empty tensor needs none of them.
        if math.prod(n or 1 for n in shape) >= 2**40:
            raise ProtocolError(f"{shown(shape)} is not a shape an empty tensor needs.")
        return torch.empty(shape, dtype=DTYPES[dtype])
    if dtype == "bool":
        bits = np.empty(size, dtype=np.uint8)
        stream.fill(bits.data)
        flags = np.unpackbits(bits, bitorder="little")
        count = math.prod(shape)
        if flags[count:].any():
            raise ProtocolError("The bits after the last flag of a bool tensor must be 0.")
        return torch.from_numpy(flags[:count].view(np.bool_)).reshape(shape)
    # Memory of torch's own: it may be changed in place, and its alignment is what kernels expect.
    tensor = torch.empty(shape, dtype=DTYPES[dtype])
    stream.fill(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return tensor


def _size(entry: Any) -> int:
    _, _, dtype, shape, *wire_dtype = entry
    if wire_dtype:
        return rounded_size(shape, wire_dtype[0])
    count: int = math.prod(shape)
    return -(-count // 8) if dtype == "bool" else count * DTYPES[dtype].itemsize


def _unpacked(packed: bytes) -> dict[str, Any]:
    """Read a header, checking all that it says."""
    check_packed(packed)
    try:
        header: dict[str, Any] = msgpack.unpackb(packed, raw=False, strict_map_key=True)
    except (ValueError, msgpack.UnpackException) as error:
        raise ProtocolError(f"The header is not msgpack: {error}") from error
    _check_header(header)
    return header


def _check_header(header: Any) -> None:
    keys = {"kind", "session", "step", "exchange", "seq", "phase", "meta", "tensors"}
    if not isinstance(header, dict) or set(header) != keys:
        raise ProtocolError(f"A header must be a map with the keys {', '.join(sorted(keys))}.")
    for key, possible in (("kind", get_args(Kind)), ("phase", get_args(Phase))):
        if header[key] not in possible:
            raise ProtocolError(
                f"Unknown {key} {shown(header[key])}. Possible: {', '.join(possible)}."
            )
    for key in ("step", "exchange", "seq"):
        if type(header[key]) is not int or not 0 <= header[key] <= MAX_NUMBER:
            raise ProtocolError(
                f"{key} must be a whole number >= 0 and below 2**63, not {shown(header[key])}."
            )
    if not isinstance(header["session"], str) or not isinstance(header["meta"], dict):
        raise ProtocolError("session must be text and meta a map.")
    if len(header["session"]) > MAX_SESSION:
        raise ProtocolError(f"The name of a session may have {MAX_SESSION} characters.")
    entries = header["tensors"]
    if not isinstance(entries, list) or len(entries) > MAX_TENSORS:
        raise ProtocolError(f"tensors must be a list of at most {MAX_TENSORS}.")
    for entry in entries:
        _check_entry(entry)
    if sum(math.prod(entry[3]) for entry in entries if entry[2] == "bool") > MAX_FLAGS:
        raise ProtocolError(f"A message may have {MAX_FLAGS} flags.")


def _check_entry(entry: Any) -> None:
    match entry:
        case [str() as name, str() as role, str() as dtype, list() as shape, *wire_dtype]:
            if len(name) > MAX_NAME:
                raise ProtocolError(
                    f"The name of a tensor may have {MAX_NAME} characters, not {len(name)}: {shown(name)}."
                )
            if role not in get_args(Role):
                raise ProtocolError(
                    f"Unknown role {shown(role)}. Possible: {', '.join(get_args(Role))}."
                )
            if dtype not in DTYPES:
                raise ProtocolError(f"Unknown dtype {shown(dtype)}. Possible: {', '.join(DTYPES)}.")
            if len(shape) > MAX_RANK or not all(type(n) is int and 0 <= n < 2**31 for n in shape):
                raise ProtocolError(
                    f"Tensor {shown(name)}: {shown(shape)} is not a shape of at most {MAX_RANK} dimensions."
                )
            if wire_dtype and wire_dtype not in _ROUNDING:
                raise ProtocolError(f"{shown(wire_dtype)} is not one wire dtype that rounds.")
        case _:
            raise ProtocolError(
                f"A tensor entry must be (name, role, dtype, shape), not {shown(entry)}."
            )


def _check_rounding(entry: Any, agreed: WireDtype) -> None:
    name, role, dtype, shape, *found = entry
    expected = [agreed] if is_rounded(role, DTYPES[dtype], agreed) else []
    if found != expected:
        raise ProtocolError(
            f"Tensor {name!r} ({role}, {dtype}) came {_way(found)}, and the parties agreed on {agreed!r}, with which it "
            f"crosses {_way(expected)}."
        )
    if found and math.prod(n or 1 for n in shape) >= 2**40:
        raise ProtocolError(f"{shape!r} is not a shape a rounded tensor needs.")


def _way(wire_dtype: Sequence[str]) -> str:
    return f"rounded to {wire_dtype[0]}" if wire_dtype else "unrounded"
