"""Key-value caches on both sides: each party fills its own layers, the other's only count positions.

The data party's cache stays the one that transformers made. Its absent layers are replaced by layers
that hold a length and pass on what is done to them (beam reordering, cropping, …); these deeds travel
with the next exchange. A cache has one part, or two in sequence-to-sequence models: self- and cross-attention.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import cache_utils
from transformers.cache_utils import Cache, EncoderDecoderCache

from vflair_core.communication.cache_kinds import (
    GROWING,
    LAYERS,
    PLAIN,
    POSSIBLE,
    growing_cache,
    layer_class,
)
from vflair_core.errors import PartitionError, ProtocolError
from vflair_core.parties.data_party.remote_cache import RemoteCache, RemoteLayer, stand_in

MAX_ROWS = 4096  # of a batch, as beams and speculation multiply it
MAX_LAYERS = 4096


def cache_argument(model: nn.Module | type[nn.Module]) -> str:
    """Return the name by which `model` takes its cache: ``"cache"`` since transformers 5.24, else ``"past_key_values"``."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def layers_of(block: nn.Module) -> frozenset[int]:
    """Numbers of the cache layers that `block` fills, as its parts give them."""
    found = [_numbers(part) for part in block.modules()]
    # Where one block has several layers, its own number counts blocks and theirs count layers.
    return frozenset().union(*found[1:]) or found[0]


def _numbers(part: nn.Module) -> frozenset[int]:
    numbers = (getattr(part, name, None) for name in ("layer_idx", "layer_id"))
    # A part that several blocks share has -1, and is told in the call which layer it fills.
    return frozenset(number for number in numbers if type(number) is int and number >= 0)


def parts_of(cache: Cache) -> list[Cache]:
    """Return the plain caches that `cache` consists of.

    Raises:
        PartitionError: It is of a class that keeps more than layers.
    """
    parts: list[Cache] = [cache]
    if type(cache) is EncoderDecoderCache:
        parts = [cache.self_attention_cache, cache.cross_attention_cache]
    for part in parts:
        if type(part).__name__ not in (*PLAIN, *GROWING):
            raise PartitionError(
                f"A {type(part).__name__} cannot be kept in two halves. Possible: {POSSIBLE}, and "
                'EncoderDecoderCache of two of them. Generate with cache_implementation="dynamic" or use_cache=False.'
            )
    return parts


def length_of(cache: Cache) -> int:
    """Positions in the cache; for layers that keep none, 1 once there is a state."""
    if all(parts_of(cache)[0].is_linear) and cache.layers:
        return int(cache.has_previous_state())
    return cache.get_seq_length()


def holds_past(cache: Cache, layers: Iterable[int]) -> bool:
    """Whether the absent `layers` of the cache hold positions already."""
    own = parts_of(cache)[0].layers
    there = (own[index] for index in layers if index < len(own))
    return any(isinstance(layer, RemoteLayer) and layer.length > 0 for layer in there)


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
        if isinstance(layer, RemoteLayer) and number in numbers:
            layer.advance(positions)


def build(parts: Any, held_layers: Sequence[int]) -> Cache:
    """Build the model party's half from the description that `attach` wrote.

    Raises:
        ProtocolError: It describes no cache, or one without the layers that are held here.
    """
    match [_built_part(part, held_layers) for part in parts]:
        case [only]:
            return only
        case [own, cross]:
            return EncoderDecoderCache(own, cross)
        case made:
            raise ProtocolError(f"A cache has one part or two, not {len(made)}.")


def _built_part(part: Any, held_layers: Sequence[int]) -> Cache:
    match part:
        case [str() as kind, []] if kind in GROWING:
            return growing_cache(kind)
        case [str() as kind, [*layers]] if kind in PLAIN:
            if len(layers) > MAX_LAYERS:
                raise ProtocolError(f"A cache may have {MAX_LAYERS} layers, not {len(layers)}.")
            if not held_layers or max(held_layers) >= len(layers):
                raise ProtocolError("The described cache does not fit this model.")
            return Cache(layers=[_built(layer) for layer in layers])
        case _:
            raise ProtocolError(f"{part!r} is not a cache. Possible: {POSSIBLE}.")


def _built(layer: Any) -> Any:
    match layer:
        case [str() as kind, dict() as options] if (
            kind in LAYERS
            and set(options) == set(LAYERS[kind][1])
            and all(type(value) is int and 1 <= value < 2**31 for value in options.values())
        ):
            return layer_class(kind)(**options)
        case _:
            raise ProtocolError(f"{layer!r} is not a cache layer. Possible: {', '.join(LAYERS)}.")


def repeat(cache: Cache, deeds: Any, held_layers: Sequence[int]) -> None:
    """Do to the model party's half what was done to the data party's."""
    parts = parts_of(cache)
    for deed in deeds:
        match deed:
            case [0 | 1 as number, str() as what, detail] if number < len(parts):
                layers = parts[number].layers
                for index in held_layers:
                    if index < len(layers):  # a growing cache has made only those it filled
                        _do(layers[index], what, detail)
            case _:
                raise ProtocolError(f"{deed!r} is not something that is done to a cache.")
        if what == "reset" and isinstance(cache, EncoderDecoderCache):
            cache.is_updated.clear()


def _do(layer: Any, what: str, detail: Any) -> None:
    match what, detail:
        case "reorder", list() as rows if len(rows) <= MAX_ROWS:
            layer.reorder_cache(torch.tensor(rows))
        case "crop", int() as count:
            layer.crop(count)
        case "repeat", int() as count if 1 <= count <= MAX_ROWS:
            layer.batch_repeat_interleave(count)
        case "select", list() as rows if len(rows) <= MAX_ROWS:
            layer.batch_select_indices(torch.tensor(rows))
        case "record", None:
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()
        case "reset", None:
            layer.reset()
        case _:
            raise ProtocolError(f"{what!r} of {detail!r} is not something done to a cache.")


def in_place(cache: Cache) -> bool:
    """Whether a forward overwrites states, so that a failed one cannot be undone."""
    linear = cache_utils.LinearAttentionCacheLayerMixin
    return any(
        type(part).__name__ in GROWING or any(isinstance(layer, linear) for layer in part.layers)
        for part in parts_of(cache)
    )
