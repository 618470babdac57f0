"""The data party's handles on what the model party keeps of a cache: how long it is, and what was done to it.

The data party's cache stays the one that transformers made. Its absent layers are replaced by layers that hold a
length and pass on what is done to them (beam reordering, cropping, …); these operations travel with the next exchange.
"""

from __future__ import annotations

import copy
import functools
import uuid
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from attrs import define, field
from torch import Tensor
from transformers.cache_utils import Cache

from vflair_core.communication.cache_kinds import (
    GROWING,
    LAYERS,
    layer_class,
    parts_of,
)
from vflair_core.errors import PartitionError, ProtocolError

# [part, "reorder", [2, 0]] | [part, "crop", -3] | [part, "repeat", 4] | [part, "select", [0]] | …
CacheOperation = list[Any]


@define(eq=False)
class RemoteCache:
    """The data party's handle on the model party's half of one cache."""

    id: str = field(factory=lambda: uuid.uuid4().hex)
    operations: list[CacheOperation] = field(factory=list)
    parts: list[list[Any]] = field(factory=list)  # of each: its kind, [kind, options] of all layers
    known: bool = False  # has the model party built its half?
    exchanges: int = 0  # that have filled it, through this handle
    copied: Callable[[str, str], None] = lambda _old, _new: None
    released: Callable[[str], None] = lambda _id: None

    def __attrs_post_init__(self) -> None:
        weakref.finalize(self, self.released, self.id)

    def __deepcopy__(self, memo: dict[int, Any]) -> RemoteCache:
        twin = RemoteCache(
            operations=list(self.operations),
            parts=self.parts,
            known=self.known,
            copied=self.copied,
            released=self.released,
        )
        memo[id(self)] = twin
        if self.known:
            self.copied(self.id, twin.id)
        return twin


class RemoteLayer:
    """Comes before a kind of cache layer: the model party fills it, here it only knows how long it is."""

    remote: RemoteCache
    part: int
    leads: bool  # speaks for all layers of its part
    length: int
    keys: Tensor

    def get_seq_length(self) -> int:
        return self.length

    def become(self, length: int) -> None:
        """Have this many positions: the model party put something in, or took something out."""
        self.length = self.cumulative_length = length
        self.is_initialized = length > 0
        self.keys = _nothing(length)  # there is something, and nothing to read
        seen: dict[int, bool] | None = getattr(self, "has_previous_state", None)
        if seen is not None:
            seen.update(dict.fromkeys(seen, length > 0))

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise ProtocolError(
            "This cache layer belongs to the model party: its block is not held here."
        )

    lazy_initialization = update = update_indexer = _refuse
    update_conv_state = update_recurrent_state = _refuse

    def offload(self) -> None:
        """Nothing is held here."""

    prefetch = offload

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._note("reorder", beam_idx.tolist())

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(
                "`crop` with a positive value is not supported: pass minus the tokens to remove."
            )
        if self.length:  # one that was never filled stays empty
            self.become(self.length + tokens_to_remove)
        self._note("crop", tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._note("repeat", repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._note("select", indices.tolist())

    def activate_past_recording(self) -> None:
        self._note("record", None)

    def reset(self) -> None:
        self.become(0)
        self._note("reset", None)

    def _note(self, operation: str, detail: Any) -> None:
        if self.leads:
            self.remote.operations.append([self.part, operation, detail])


@functools.lru_cache(maxsize=4)  # all layers of a cache grow by as much, one after the other
def _nothing(length: int) -> Tensor:
    return torch.empty(length, device="meta")


def stand_in(
    kind: str, options: Mapping[str, Any], remote: RemoteCache, part: int, *, leads: bool
) -> RemoteLayer:
    """Make the stand-in of an absent layer; the one that `leads` speaks for all of its part."""
    made: RemoteLayer = _remote_kind(kind)(**options)
    made.remote, made.part, made.leads, made.length = remote, part, leads, 0
    return made


@functools.cache
def _remote_kind(kind: str) -> type:
    # Without a type of its own: transformers would use the class for all new caches of that type.
    return type(f"Remote{kind}", (RemoteLayer, layer_class(kind)), {"_layer_type": None})


def copied(cache: Cache) -> Cache:
    """A copy for a run that sends nothing: the model party is not told, and keeps no half of it."""
    remote = attached(cache)
    memo: dict[int, Any] = {}
    if remote is not None:
        memo[id(remote)] = RemoteCache(
            operations=list(remote.operations), parts=remote.parts, known=remote.known
        )
    with torch.inference_mode(mode=False), torch.no_grad():
        for tensor in _tensors_in(cache):  # their values only: a graph may hang on them
            memo[id(tensor)] = tensor.detach().clone()
        return copy.deepcopy(cache, memo)


def _tensors_in(cache: Cache) -> list[Tensor]:
    values = [v for part in parts_of(cache) for layer in part.layers for v in vars(layer).values()]
    inner = [w for v in values if isinstance(v, dict) for w in v.values()]
    return [v for v in (*values, *inner) if isinstance(v, Tensor) and not v.is_meta]


def length_of(cache: Cache) -> int:
    """Positions in the cache; for layers that keep none, 1 once there is a state."""
    own = parts_of(cache)[0]
    if own.layers and all(own.is_linear):
        return int(cache.has_previous_state())
    return cache.get_seq_length()


def holds_past(cache: Cache, layers: Iterable[int]) -> bool:
    """Whether the absent `layers` of the cache hold positions already."""
    local = parts_of(cache)[0].layers
    held = (local[index] for index in layers if index < len(local))
    return any(isinstance(layer, RemoteLayer) and layer.length > 0 for layer in held)


def attached(cache: Cache) -> RemoteCache | None:
    """The handle of a cache that was made ready before."""
    return getattr(cache, "vflair_remote", None)


def attach(
    cache: Cache,
    absent_layers: Iterable[int],
    released: Callable[[str], None],
    copied: Callable[[str, str], None] = lambda _old, _new: None,
) -> RemoteCache:
    """Make `cache` ready for the cut, once: absent layers become `RemoteLayer`s.

    `released` is called with the cache's id when it is no longer used.

    Raises:
        PartitionError: A layer is of a kind whose state the model party cannot keep.
    """
    if (known := attached(cache)) is not None:
        return known
    remote, layers = RemoteCache(copied=copied, released=released), sorted(absent_layers)
    if not layers:
        raise PartitionError(
            "The blocks of this model do not say which layer of a cache they fill (layer_idx). Use use_cache=False."
        )
    for number, part in enumerate(parts_of(cache)):
        make = part.layer_class_to_replicate
        while make is not None and len(part.layers) <= layers[-1]:
            part.layers.append(make())
        described = [_described(layer) for layer in part.layers]
        grows = type(part).__name__ in GROWING  # the other half makes its layers itself
        remote.parts.append([type(part).__name__, [] if grows else described])
        if any(getattr(part.layers[index], "record_past", False) for index in layers):
            remote.operations.append(
                [number, "record", None]
            )  # was asked for before the cut was met
        leader = True
        for index in layers:
            kind, options = described[index]
            if kind == "DummyLayer":
                continue
            layer: Any = stand_in(kind, options, remote, number, leads=leader)
            part.layers[index] = layer
            leader = False
    cache.vflair_remote = remote  # type: ignore[attr-defined]
    return remote


def _described(layer: Any) -> list[Any]:
    kind = type(layer).__name__
    if kind not in LAYERS:
        raise PartitionError(
            f"A cache of {kind} cannot be kept in two halves. Possible: {', '.join(LAYERS)}. "
            'Generate with cache_implementation="dynamic" or use_cache=False.'
        )
    return [kind, {option: getattr(layer, option) for option in LAYERS[kind][1]}]


def advance(cache: Cache, positions: int, numbers: Collection[int]) -> None:
    """Count `positions` new positions in the absent layers of these `numbers`; cross-attention keeps the encoder's."""
    for number, layer in enumerate(parts_of(cache)[0].layers):
        if number in numbers and isinstance(layer, RemoteLayer):
            layer.become(layer.length + positions)
