"""Key-value caches on both sides: each party fills its own layers, the other's only count positions.

The data party's cache stays the one that transformers made. Its absent layers are replaced by layers
that hold a length and pass on what is done to them (beam reordering, cropping, …); these deeds travel
with the next exchange.
"""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from attrs import define, field
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from vflair_core.errors import PartitionError, ProtocolError

Deed = list[Any]  # ["reorder", [2, 0]] | ["crop", -3] | ["repeat", 4] | ["select", [0]] | ["reset"]
MAX_ROWS = 4096  # of a batch, as beams and speculation multiply it
KINDS = {"DynamicLayer": DynamicLayer, "DynamicSlidingWindowLayer": DynamicSlidingWindowLayer}


@define(eq=False)
class RemoteCache:
    """The data party's handle on the model party's half of one cache."""

    id: str = field(factory=lambda: uuid.uuid4().hex)
    deeds: list[Deed] = field(factory=list)
    layers: list[list[Any]] = field(factory=list)  # [kind, sliding window or None], all layers
    known: bool = False  # has the model party built its half?
    copied: Callable[[str, str], None] = lambda _old, _new: None
    released: Callable[[str], None] = lambda _id: None

    def __attrs_post_init__(self) -> None:
        weakref.finalize(self, self.released, self.id)

    def __deepcopy__(self, memo: dict[int, Any]) -> RemoteCache:
        twin = RemoteCache(
            deeds=list(self.deeds),
            layers=self.layers,
            known=self.known,
            copied=self.copied,
            released=self.released,
        )
        memo[id(self)] = twin
        if self.known:
            self.copied(self.id, twin.id)
        return twin


class RemoteLayer(CacheLayerMixin):
    """A cache layer that the model party fills: here it only knows how long it is."""

    is_croppable = True

    def __init__(self, remote: RemoteCache, sliding_window: int | None, *, leads: bool) -> None:
        super().__init__()
        self.remote, self.sliding_window, self.leads = remote, sliding_window, leads
        self.is_sliding = sliding_window is not None
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise ProtocolError("This cache layer belongs to the model party.")

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        raise ProtocolError(
            "This cache layer belongs to the model party: its block is not held here."
        )

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1 if self.sliding_window is None else self.sliding_window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.sliding_window is None:
            return self.length + query_length, 0
        kept = min(self.length, self.sliding_window - 1)
        return kept + query_length, self.length - kept

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._note(["reorder", beam_idx.tolist()])

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(
                "`crop` with a positive value is not supported: pass minus the tokens to remove."
            )
        self.length -= abs(tokens_to_remove)
        self._note(["crop", tokens_to_remove])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._note(["repeat", repeats])

    def batch_select_indices(self, indices: Tensor) -> None:
        self._note(["select", indices.tolist()])

    def reset(self) -> None:
        self.length = 0
        self._note(["reset"])

    def _note(self, deed: Deed) -> None:
        if self.leads:
            self.remote.deeds.append(deed)


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
    remote: RemoteCache | None = getattr(cache, "vflair_remote", None)
    if remote is not None:
        return remote
    remote, layers = RemoteCache(copied=copied, released=released), sorted(absent_layers)
    make = cache.layer_class_to_replicate
    while make is not None and len(cache.layers) <= layers[-1]:
        cache.layers.append(make())
    for layer in cache.layers:
        kind = type(layer).__name__
        if kind not in KINDS:
            raise PartitionError(
                f"A cache of {kind} cannot be kept in two halves. Possible: {', '.join(KINDS)}. "
                'Generate with cache_implementation="dynamic" or use_cache=False.'
            )
        remote.layers.append([kind, getattr(layer, "sliding_window", None)])
    for index in layers:
        window = remote.layers[index][1]
        cache.layers[index] = RemoteLayer(remote, window, leads=index == layers[0])
    cache.vflair_remote = remote  # type: ignore[attr-defined]
    return remote


def advance(cache: Cache, absent_layers: Iterable[int], positions: int) -> None:
    """Count `positions` new positions in the absent layers."""
    for index in absent_layers:
        cache.layers[index].length += positions  # type: ignore[union-attr]


def build(layers: Any) -> Cache:
    """Build the model party's half from the description that `attach` wrote."""
    made: list[Any] = []
    for entry in layers:
        match entry:
            case ["DynamicLayer", None]:
                made.append(DynamicLayer())
            case ["DynamicSlidingWindowLayer", int() as window] if window > 1:
                made.append(DynamicSlidingWindowLayer(sliding_window=window))
            case _:
                raise ProtocolError(
                    f"{entry!r} is not a cache layer. Possible: {', '.join(KINDS)}."
                )
    return Cache(layers=made)


def repeat(cache: Cache, deeds: Any, held_layers: Iterable[int]) -> None:
    """Do to the model party's half what was done to the data party's."""
    for deed in deeds:
        layers: list[Any] = [cache.layers[index] for index in held_layers]
        for layer in layers:
            match deed:
                case ["reorder", list() as indices] if len(indices) <= MAX_ROWS:
                    layer.reorder_cache(torch.tensor(indices))
                case ["crop", int() as count]:
                    layer.crop(count)
                case ["repeat", int() as count] if 1 <= count <= MAX_ROWS:
                    layer.batch_repeat_interleave(count)
                case ["select", list() as indices] if len(indices) <= MAX_ROWS:
                    layer.batch_select_indices(torch.tensor(indices))
                case ["reset"]:
                    layer.reset()
                case _:
                    raise ProtocolError(f"{deed!r} is not something that is done to a cache.")
