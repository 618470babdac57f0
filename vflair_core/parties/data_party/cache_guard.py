"""Both halves of a cache hold the same positions, whatever happens to a call that fills them.

A cache may be given to a call only if all it holds was put in through this data party; and a call that breaks off leaves
the cache as it was before, or, where that cannot be, of no further use.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from attrs import frozen
from transformers import cache_utils
from transformers.cache_utils import Cache, EncoderDecoderCache

from vflair_core.communication.cache_kinds import GROWING, parts_of
from vflair_core.errors import ProtocolError
from vflair_core.parties.data_party.remote_cache import RemoteCache, attached

_BROKEN = "vflair_broken"


@contextmanager
def guarded(cache: Cache | None) -> Iterator[None]:
    """While this lasts, a call may fill `cache`; if the call fails, it has filled nothing.

    Raises:
        ProtocolError: The model party lacks what the cache holds.
    """
    if cache is None:
        yield
        return
    _check(cache)
    before = _Snapshot.of(cache)
    try:
        yield
    except BaseException:
        before.restore(cache)
        raise


def _check(cache: Cache) -> None:
    if getattr(cache, _BROKEN, False):
        raise ProtocolError(
            "A call broke off while it filled this cache, and its halves are not alike any more. Begin with a new one."
        )
    remote = attached(cache)
    if remote is not None and remote.known:
        return
    if any(_is_filled(layer) for part in parts_of(cache) for layer in part.layers):
        raise ProtocolError(
            "This cache was filled elsewhere: it holds keys and values of layers that the model party runs, and the model "
            "party does not have them. Begin with an empty cache, and put all text in through data_party.model. Prefix "
            "tuning fills such caches; use prompt tuning or LoRA instead."
        )


def _is_filled(layer: Any) -> bool:
    states: dict[int, bool] = getattr(layer, "has_previous_state", None) or {}
    length = layer.get_seq_length() if hasattr(layer, "get_seq_length") else 0
    return any(states.values()) or int(length) > 0


@frozen(eq=False)
class _Snapshot:
    """What a cache referred to before a call."""

    layers: list[
        list[tuple[Any, dict[str, Any]]]
    ]  # of each part, with all that each layer refers to
    remote: RemoteCache | None
    exchanges: int  # that had filled the model party's half
    cross: dict[int, bool] | None  # which layers of cross-attention were filled

    @classmethod
    def of(cls, cache: Cache) -> _Snapshot:
        layers = [[(layer, _copied(layer)) for layer in part.layers] for part in parts_of(cache)]
        remote = attached(cache)
        cross = dict(cache.is_updated) if isinstance(cache, EncoderDecoderCache) else None
        return cls(layers, remote, remote.exchanges if remote else 0, cross)

    def restore(self, cache: Cache) -> None:
        now = attached(cache)
        sent = now is not None and now.exchanges > (self.exchanges if now is self.remote else 0)
        if sent or _is_overwritten(cache):
            setattr(cache, _BROKEN, True)
            return
        for part, layers in zip(parts_of(cache), self.layers, strict=True):
            for layer, values in layers:
                vars(layer).clear()
                vars(layer).update(values)
            part.layers[:] = [layer for layer, _ in layers]
        if self.cross is not None:
            assert isinstance(cache, EncoderDecoderCache)
            cache.is_updated.clear()
            cache.is_updated.update(self.cross)
        if self.remote is None and now is not None:
            del cache.vflair_remote  # type: ignore[attr-defined]


def _copied(layer: Any) -> dict[str, Any]:
    return {k: dict(v) if isinstance(v, dict) else v for k, v in vars(layer).items()}


def _is_overwritten(cache: Cache) -> bool:
    """Whether calls overwrite what the cache holds, so that a reference to it says nothing of before."""
    linear = cache_utils.LinearAttentionCacheLayerMixin
    return any(
        type(part).__name__ in GROWING or any(isinstance(layer, linear) for layer in part.layers)
        for part in parts_of(cache)
    )
