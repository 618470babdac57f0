"""The model party's half of the caches of a session: it fills its own layers, and what is done to the rest is repeated on it.

A cache has one part, or two in sequence-to-sequence models: self- and cross-attention. What a description may ask for is
looked up in what the model's own caches are made of, and what a deed costs is known before it is done.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from attrs import frozen
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from vflair_core.communication.cache_kinds import (
    GROWING,
    LAYERS,
    PLAIN,
    POSSIBLE,
    growing_cache,
    layer_class,
    parts_of,
)
from vflair_core.errors import ProtocolError, shown
from vflair_core.parties.model_party.cache_deeds import bytes_of, detached, replay, too_large
from vflair_core.parties.model_party.caps import Caps

_DEPTHS = ("num_hidden_layers", "num_decoder_layers", "decoder_layers")  # as configs call it


@frozen
class Offer:
    """What the layers of a model's caches can be: the options of each kind have the values that its config gives."""

    layers: int
    options: Mapping[str, frozenset[int]]  # by name

    @classmethod
    def of(cls, config: PreTrainedConfig | None) -> Offer:
        """What the caches of the model of `config` are made of; without one there are no options to offer."""
        if config is None:
            return cls(0, {})
        decoder = config.get_text_config(decoder=True)
        names = {option for _, options in LAYERS.values() for option in options}
        made = DynamicCache(config=config).layers
        values = {name: {getattr(layer, name, None) for layer in made} for name in names}
        for name, own in values.items():
            own.add(getattr(decoder, name, None))
        found = {n: frozenset(v for v in own if type(v) is int) for n, own in values.items()}
        depths = [getattr(each, name, None) for each in (config, decoder) for name in _DEPTHS]
        return cls(max([len(made), *(d for d in depths if type(d) is int)]), found)


class HeldCaches:
    """The caches of one session, by the names that the data party gave them."""

    def __init__(self, caps: Caps, offer: Offer) -> None:
        self._caches: dict[str, Cache] = {}
        self._sizes: dict[str, int] = {}  # in bytes
        self._caps, self._offer = caps, offer

    def __len__(self) -> int:
        return len(self._caches)

    def __iter__(self) -> Iterator[Cache]:
        return iter(self._caches.values())

    @property
    def nbytes(self) -> int:
        """Bytes that all of them hold."""
        return sum(self._sizes.values())

    @contextmanager
    def lend(self, spec: Any, layers: Sequence[int], room: int) -> Iterator[Cache | None]:
        """Bring the cache of `spec` up to date and lend it; if what is done with it fails, it is as it was before.

        Args:
            spec: What the message says of it; None for no cache.
            layers: Numbers of the layers that are filled here.
            room: Bytes that the caches of this session may have.

        Raises:
            ProtocolError: There is no such cache, or one too many, or `spec` asks for what no cache does.
        """
        if spec is None:
            yield None
            return
        key = spec["id"]
        if not isinstance(key, str):
            raise ProtocolError(f"A cache's name is a text, not {shown(key)}.")
        known = self._caches.get(key)
        before = _Snapshot.of(known) if known is not None else None
        size = self._sizes.get(key, 0)
        try:
            yield self._prepared(spec, layers, room)
            self._sizes[key] = bytes_of(self._caches[key])
        except BaseException:
            if known is not None and before is not None:
                before.restore(known)
                self._sizes[key] = size
            else:
                self.drop(key)
            raise

    def copy(self, pairs: Any, gone: Iterable[str], room: int) -> list[str]:
        """Copy caches, (old, new) each, where `gone` are dropped afterwards; return the names of the copies.

        What was lost before it could be copied stays lost: who asks for it is told so.

        Raises:
            ProtocolError: There are too many, or they are too large.
        """
        wanted = [(old, new) for old, new in pairs if old in self._caches]
        if not wanted:
            return []
        if taken := [new for _, new in wanted if new in self._caches]:
            raise ProtocolError(
                f"There is a cache {shown(taken[0])} already; a copy has a name of its own."
            )
        self._make_room(len(wanted) - len(set(gone) & set(self._caches)))
        if self.nbytes + sum(self._sizes[old] for old, _ in wanted) > room:
            raise too_large(room)
        for old, new in wanted:
            self._caches[new] = copy.deepcopy(self._caches[old])
            self._sizes[new] = self._sizes[old]
        return [new for _, new in wanted]

    def set_aside(self, keys: Iterable[str]) -> dict[str, tuple[Cache, int]]:
        """Forget caches, and return them for `put_back`."""
        known = [key for key in keys if key in self._caches]
        return {key: (self._caches.pop(key), self._sizes.pop(key, 0)) for key in known}

    def put_back(self, caches: Mapping[str, tuple[Cache, int]]) -> None:
        """Take up what was set aside."""
        for key, (cache, size) in caches.items():
            self._caches[key], self._sizes[key] = cache, size

    def drop(self, key: str) -> None:
        """Forget a cache."""
        self._caches.pop(key, None)
        self._sizes.pop(key, None)

    def _prepared(self, spec: Any, layers: Sequence[int], room: int) -> Cache:
        key = spec["id"]
        if key not in self._caches:
            if "parts" not in spec:
                raise ProtocolError(
                    f"There is no cache {shown(key)} in this session; a failed call may have dropped it."
                )
            self._make_room(1)
            self._caches[key] = build(spec["parts"], layers, self._offer)
        cache = self._caches[key]
        if spec["deeds"] or key not in self._sizes:
            replay(cache, spec["deeds"], layers, self._caps, room - self._beside(key))
            self._sizes[key] = bytes_of(cache)
        return cache

    def left(self, room: int) -> int:
        """Bytes by which a cache that is lent may grow."""
        return room - self.nbytes

    def _beside(self, key: str) -> int:
        return self.nbytes - self._sizes.get(key, 0)

    def _make_room(self, count: int) -> None:
        if len(self._caches) + count > self._caps.caches:
            raise ProtocolError(
                f"A session may keep {self._caps.caches} caches; delete unused ones."
            )


def build(parts: Any, held_layers: Sequence[int], offer: Offer) -> Cache:
    """Build the model party's half from the description that `attach` wrote.

    Raises:
        ProtocolError: It describes no cache, or one that is not of this model.
    """
    if not isinstance(parts, (list, tuple)) or not 1 <= len(parts) <= 2:
        raise ProtocolError(f"A cache has one part or two, not {shown(parts)}.")
    match [_built_part(part, held_layers, offer) for part in parts]:
        case [only]:
            return only
        case [own, cross]:
            return EncoderDecoderCache(own, cross)
    raise AssertionError


def _built_part(part: Any, held_layers: Sequence[int], offer: Offer) -> Cache:
    match part:
        case [str() as kind, []] if kind in GROWING:
            return growing_cache(kind)
        case [str() as kind, [*layers]] if kind in PLAIN:
            last = max(held_layers, default=-1)
            if not held_layers or not last < len(layers) <= max(offer.layers, last + 1):
                raise ProtocolError(
                    f"The described cache of {len(layers)} layers does not fit this model, whose caches have {offer.layers}."
                )
            return Cache(layers=[_built(layer, offer) for layer in layers])
        case _:
            raise ProtocolError(f"{shown(part)} is not a cache. Possible: {POSSIBLE}.")


def _built(layer: Any, offer: Offer) -> Any:
    match layer:
        case [str() as kind, dict() as options] if kind in LAYERS and set(options) == set(
            LAYERS[kind][1]
        ):
            for name, value in options.items():
                if type(value) is not int or value not in offer.options.get(name, ()):
                    possible = ", ".join(map(str, sorted(offer.options.get(name, ())))) or "none"
                    raise ProtocolError(
                        f"A layer of a cache with {name}={shown(value)} is none of this model's. Possible: {possible}."
                    )
            return layer_class(kind)(**options)
        case _:
            raise ProtocolError(
                f"{shown(layer)} is not a cache layer. Possible: {', '.join(LAYERS)}."
            )


@frozen(eq=False)
class _Snapshot:
    """What a cache held before a call: its states are replaced by calls, and those in lists and tables overwritten."""

    parts: list[tuple[dict[str, Any], list[tuple[Any, dict[str, Any]]]]]
    updated: dict[int, bool] | None  # which layers of cross-attention were filled

    @classmethod
    def of(cls, cache: Cache) -> _Snapshot:
        parts = [
            (
                {
                    k: detached(v)
                    for k, v in vars(part).items()
                    if isinstance(v, list) and k != "layers"
                },
                [(layer, _kept(layer)) for layer in part.layers],
            )
            for part in parts_of(cache)
        ]
        updated = dict(cache.is_updated) if isinstance(cache, EncoderDecoderCache) else None
        return cls(parts, updated)

    def restore(self, cache: Cache) -> None:
        for part, (lists, layers) in zip(parts_of(cache), self.parts, strict=True):
            vars(part).update(lists)
            for layer, values in layers:
                vars(layer).clear()
                vars(layer).update(values)
            part.layers[:] = [layer for layer, _ in layers]
        if self.updated is not None:
            assert isinstance(cache, EncoderDecoderCache)
            cache.is_updated.clear()
            cache.is_updated.update(self.updated)


def _kept(layer: Any) -> dict[str, Any]:
    return {k: detached(v) if isinstance(v, (dict, list)) else v for k, v in vars(layer).items()}
