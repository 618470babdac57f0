"""The caches, and kinds of layer in them, whose state can be kept in two halves: a table, read by both parties.

A message names a kind; what it names is looked up here and nowhere else.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from typing import Any

from torch import nn
from transformers.cache_utils import Cache, EncoderDecoderCache

from vflair_core.errors import PartitionError, ProtocolError

_COMMON = "transformers.cache_utils"
# Kind of layer -> where its class lies, and the options it is made with.
LAYERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "DynamicLayer": (_COMMON, ()),
    "DynamicSlidingWindowLayer": (_COMMON, ("sliding_window",)),
    "DynamicIndexedLayer": (_COMMON, ()),
    "LinearAttentionLayer": (_COMMON, ("number_of_states",)),
    "LinearAttentionAndFullAttentionLayer": (_COMMON, ("number_of_states",)),
    "LinearAttentionAndSlidingWindowAttentionLayer": (
        _COMMON,
        ("sliding_window", "number_of_states"),
    ),
    "DummyLayer": (_COMMON, ()),
}
# Caches that keep states of their own besides their layers, which they make as they are filled.
GROWING: dict[str, str] = {"MiniMaxCache": "transformers.models.minimax.modeling_minimax"}
PLAIN = ("DynamicCache", "Cache")
POSSIBLE = ", ".join((*PLAIN, *GROWING))


@functools.cache
def layer_class(kind: str) -> type[Any]:
    """Return the class of a kind of layer.

    Raises:
        ProtocolError: There is none in the table, or none in the transformers that is installed.
    """
    if kind not in LAYERS:
        raise ProtocolError(f"{kind!r} is not a cache layer. Possible: {', '.join(LAYERS)}.")
    return _found(LAYERS[kind][0], kind)


def growing_cache(kind: str) -> Cache:
    """Return a new cache of a kind that makes its own layers.

    Raises:
        ProtocolError: There is none in the table, or none in the transformers that is installed.
    """
    if kind not in GROWING:
        raise ProtocolError(f"{kind!r} is not a cache. Possible: {POSSIBLE}.")
    made: Cache = _found(GROWING[kind], kind)()
    return made


def _found(place: str, kind: str) -> type[Any]:
    try:
        layer: type[Any] = getattr(importlib.import_module(place), kind)
    except (ImportError, AttributeError) as error:
        raise ProtocolError(f"The installed transformers has no {kind}: {error}.") from error
    return layer


def cache_argument(model: nn.Module | type[nn.Module]) -> str:
    """Return the name by which `model` takes its cache: ``"cache"`` since transformers 5.24, else ``"past_key_values"``."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def layers_of(block: nn.Module) -> frozenset[int]:
    """Numbers of the cache layers that `block` fills, as its parts give them."""
    numbers = [_numbers(part) for part in block.modules()]
    # Where one block has several layers, its own number counts blocks and theirs count layers.
    return frozenset().union(*numbers[1:]) or numbers[0]


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
