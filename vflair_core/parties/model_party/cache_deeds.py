"""What is done to a cache besides filling it (reordered for beams, cropped, …), whose cost is known before it is done."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, EncoderDecoderCache

from vflair_core.communication.cache_kinds import parts_of
from vflair_core.errors import ProtocolError, shown
from vflair_core.parties.model_party.caps import Caps

MAX_DEEDS = 1024  # of one message


def replay(
    cache: Cache, operations: Any, held_layers: Sequence[int], caps: Caps, room: int
) -> None:
    """Do to the model party's half what was done to the data party's; it may have `room` bytes then.

    Raises:
        ProtocolError: A deed is none, or makes the cache too large.
    """
    parts = parts_of(cache)
    if len(operations) > MAX_DEEDS:
        raise ProtocolError(f"{len(operations)} deeds came for a cache at once; {MAX_DEEDS} may.")
    work = 0
    for operation in operations:
        match operation:
            case [0 | 1 as number, str() as what, detail] if number < len(parts):
                layers = [
                    parts[number].layers[index]
                    for index in held_layers
                    if index < len(parts[number].layers)  # a growing cache has made those it filled
                ]
                work += _check_deed(cache, layers, what, detail, caps, room)
                if work > caps.step_bytes:
                    raise ProtocolError(
                        f"What was done to this cache would move more than {caps.step_bytes} bytes (the limit step_bytes)."
                    )
                for layer in layers:
                    _do(layer, what, detail)
            case _:
                raise ProtocolError(f"{shown(operation)} is not something that is done to a cache.")
        if what == "reset" and isinstance(cache, EncoderDecoderCache):
            cache.is_updated.clear()


def _check_deed(
    cache: Cache, layers: Sequence[Any], what: str, detail: Any, caps: Caps, room: int
) -> int:
    """See that a deed leaves a cache that may be; return the bytes that it moves."""
    rows = max((_rows_of(layer) for layer in layers), default=0)
    match what, detail:
        case "repeat", int() as count if type(count) is int and count >= 1:
            after = rows * count
        case (("reorder" | "select"), list() as chosen) if all(type(row) is int for row in chosen):
            after = len(chosen)
            if rows and not all(0 <= row < rows for row in chosen):
                raise ProtocolError(f"Rows of a cache that has {rows} are counted from 0.")
        case "crop", int() as count if type(count) is int and count <= 0:
            return 0
        case (("record" | "reset"), None):
            return bytes_of(cache)
        case _:
            raise ProtocolError(
                f"{shown(what)} of {shown(detail)} is not something done to a cache."
            )
    if after > caps.cache_rows:
        raise ProtocolError(
            f"{what!r} would give this cache {after} rows; a cache may have {caps.cache_rows} (the limit cache_rows)."
        )
    moved = bytes_of(cache) // max(rows, 1) * after
    if moved > room:
        raise too_large(room)
    return moved


def _rows_of(layer: Any) -> int:
    sizes = (tensor.shape[0] for tensor in _tensors_of(layer) if tensor.dim() > 1)
    return next(sizes, 0)


def _do(layer: Any, what: str, detail: Any) -> None:
    match what:
        case "reorder":
            layer.reorder_cache(torch.tensor(detail))
        case "crop":
            layer.crop(detail)
        case "repeat":
            layer.batch_repeat_interleave(detail)
        case "select":
            layer.batch_select_indices(torch.tensor(detail))
        case "record":
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()
        case "reset":
            for key, value in vars(layer).items():
                vars(layer)[key] = detached(value)  # it is zeroed in place, and may be wanted again
            layer.reset()


def bytes_of(cache: Cache) -> int:
    """Bytes that the states in a cache hold."""
    return sum(
        tensor.nbytes
        for part in parts_of(cache)
        for holder in (*part.layers, part)
        for tensor in _tensors_of(holder)
    )


def _tensors_of(holder: Any) -> Iterator[Tensor]:
    for value in vars(holder).values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (dict, list)):
            inner = value.values() if isinstance(value, dict) else value
            yield from (one for one in inner if isinstance(one, Tensor))


def too_large(room: int) -> ProtocolError:
    """The error of a cache that would have more bytes than `room`."""
    return ProtocolError(
        f"This cache would grow beyond the {max(room, 0)} bytes that are left for it at the model party (its limit cache_bytes, "
        "for all sessions). Delete unused caches, or use shorter texts or fewer rows."
    )


def detached(value: Any) -> Any:
    """A copy of what calls overwrite in place; other values are only referred to."""
    if isinstance(value, dict):
        return {k: v.clone() if isinstance(v, Tensor) else v for k, v in value.items()}
    if isinstance(value, list):
        return [v.clone() if isinstance(v, Tensor) else v for v in value]
    return value.clone() if isinstance(value, Tensor) else value
