"""The caches, and kinds of layer in them, whose state can be kept in two halves: a table, read by both parties.

A message names a kind; what it names is looked up here and nowhere else.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from transformers.cache_utils import Cache

from vflair_core.errors import ProtocolError

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
    "UnlimitedOcrDynamicReferenceSlidingWindowLayer": (
        "transformers.models.unlimited_ocr.modeling_unlimited_ocr",
        ("sliding_window",),
    ),
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
        found: type[Any] = getattr(importlib.import_module(place), kind)
    except (ImportError, AttributeError) as error:
        raise ProtocolError(f"The installed transformers has no {kind}: {error}.") from error
    return found
