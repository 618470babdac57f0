"""The model party's half of the caches of a session: it fills its own layers, and what is done to the rest is repeated on it.

A cache has one part, or two in sequence-to-sequence models: self- and cross-attention.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import cache_utils
from transformers.cache_utils import Cache, EncoderDecoderCache

from vflair_core.communication.cache_kinds import (
    GROWING,
    LAYERS,
    PLAIN,
    POSSIBLE,
    growing_cache,
    layer_class,
    parts_of,
)
from vflair_core.errors import ProtocolError
from vflair_core.parties.model_party.caps import Caps

MAX_ROWS = 4096  # of a batch, as beams and speculation multiply it
MAX_LAYERS = 4096


class HeldCaches:
    """The caches of one session, by the names that the data party gave them."""

    def __init__(self, caps: Caps) -> None:
        self._caches: dict[str, Cache] = {}
        self._caps = caps

    def __len__(self) -> int:
        return len(self._caches)

    def __iter__(self) -> Iterator[Cache]:
        return iter(self._caches.values())

    @contextmanager
    def lend(self, spec: Any, layers: Sequence[int]) -> Iterator[Cache | None]:
        """Bring the cache of `spec` up to date and lend it; if what is done with it fails, it is as it was before.

        One whose states are overwritten in place (linear attention) is dropped instead.

        Raises:
            ProtocolError: There is no such cache, or one too many, or `spec` asks for what no cache does.
        """
        if spec is None:
            yield None
            return
        key = spec["id"]
        known = self._caches.get(key)
        before = _snapshot(known) if known and not in_place(known) else None
        try:
            yield self._prepared(spec, layers)
        except BaseException:
            if known and before is not None:
                for part, layers_before in zip(parts_of(known), before, strict=True):
                    part.layers[:] = [_restored(*layer) for layer in layers_before]
            else:
                self._caches.pop(key, None)
            raise

    def copy(self, old: str, new: str) -> None:
        """Keep a copy of a cache under another name."""
        self._make_room()
        self._caches[new] = copy.deepcopy(self._caches[old])

    def drop(self, key: str) -> None:
        """Forget a cache."""
        self._caches.pop(key, None)

    def _prepared(self, spec: Any, layers: Sequence[int]) -> Cache:
        key = spec["id"]
        if key not in self._caches:
            if "parts" not in spec:
                raise ProtocolError(
                    f"There is no cache {key!r} in this session; a failed call may have dropped it."
                )
            self._make_room()
            self._caches[key] = build(spec["parts"], layers)
        replay(self._caches[key], spec["deeds"], layers)
        return self._caches[key]

    def _make_room(self) -> None:
        if len(self._caches) >= self._caps.caches:
            raise ProtocolError(
                f"A session may keep {self._caps.caches} caches; delete unused ones."
            )


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


def replay(cache: Cache, operations: Any, held_layers: Sequence[int]) -> None:
    """Do to the model party's half what was done to the data party's."""
    parts = parts_of(cache)
    for operation in operations:
        match operation:
            case [0 | 1 as number, str() as what, detail] if number < len(parts):
                layers = parts[number].layers
                for index in held_layers:
                    if index < len(layers):  # a growing cache has made only those it filled
                        _do(layers[index], what, detail)
            case _:
                raise ProtocolError(f"{operation!r} is not something that is done to a cache.")
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
        type(part).__name__ in GROWING
        or any(issubclass(kind, linear) for kind in set(map(type, part.layers)))
        for part in parts_of(cache)
    )


def _snapshot(cache: Cache) -> list[list[tuple[Any, dict[str, Any]]]]:
    """The layers of each part, and all that each of them refers to now; taken before every call, restored seldom."""
    return [[(layer, vars(layer).copy()) for layer in part.layers] for part in parts_of(cache)]


def _restored(layer: Any, state: dict[str, Any]) -> Any:
    vars(layer).clear()
    vars(layer).update(state)
    return layer
