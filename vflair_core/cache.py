"""Key-value caches on both sides: each party fills its own layers, the other's only count positions.

The data party's cache stays the one that transformers made. Its absent layers are replaced by layers
that hold a length and pass on what is done to them (beam reordering, cropping, …); these deeds travel
with the next exchange. A cache has one part, or two in sequence-to-sequence models: self- and cross-attention.
"""

from __future__ import annotations

import functools
import inspect
import uuid
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from attrs import define, field
from torch import Tensor, nn
from transformers import cache_utils
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from vflair_core.errors import PartitionError, ProtocolError

# [part, "reorder", [2, 0]] | [part, "crop", -3] | [part, "repeat", 4] | [part, "select", [0]] | …
Deed = list[Any]
MAX_ROWS = 4096  # of a batch, as beams and speculation multiply it
MAX_LAYERS = 4096
# The kinds of layer whose state can be kept in two halves, and the options they are made with.
KINDS: dict[str, tuple[type, tuple[str, ...]]] = {
    kind: (getattr(cache_utils, kind), options)
    for kind, options in {
        "DynamicLayer": (),
        "DynamicSlidingWindowLayer": ("sliding_window",),
        "DynamicIndexedLayer": (),
        "LinearAttentionLayer": ("number_of_states",),
        "LinearAttentionAndFullAttentionLayer": ("number_of_states",),
        "LinearAttentionAndSlidingWindowAttentionLayer": ("sliding_window", "number_of_states"),
        "DummyLayer": (),
    }.items()
    if hasattr(cache_utils, kind)
}


@define(eq=False)
class RemoteCache:
    """The data party's handle on the model party's half of one cache."""

    id: str = field(factory=lambda: uuid.uuid4().hex)
    deeds: list[Deed] = field(factory=list)
    parts: list[list[list[Any]]] = field(factory=list)  # of each part: [kind, options], all layers
    known: bool = False  # has the model party built its half?
    copied: Callable[[str, str], None] = lambda _old, _new: None
    released: Callable[[str], None] = lambda _id: None

    def __attrs_post_init__(self) -> None:
        weakref.finalize(self, self.released, self.id)

    def __deepcopy__(self, memo: dict[int, Any]) -> RemoteCache:
        twin = RemoteCache(
            deeds=list(self.deeds),
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

    def get_seq_length(self) -> int:
        return self.length

    def advance(self, positions: int) -> None:
        """Count new positions, which the model party put in."""
        self._become(self.length + positions)

    def _become(self, length: int) -> None:
        self.length = self.cumulative_length = length
        self.is_initialized = length > 0
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
        self._become(self.length + tokens_to_remove)
        self._note("crop", tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._note("repeat", repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._note("select", indices.tolist())

    def activate_past_recording(self) -> None:
        self._note("record", None)

    def reset(self) -> None:
        self._become(0)
        self._note("reset", None)

    def _note(self, deed: str, detail: Any) -> None:
        if self.leads:
            self.remote.deeds.append([self.part, deed, detail])


@functools.cache
def _remote_kind(kind: str) -> type:
    return type(f"Remote{kind}", (RemoteLayer, KINDS[kind][0]), {})


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
    return frozenset(number for number in numbers if type(number) is int)


def parts_of(cache: Cache) -> list[Cache]:
    """Return the plain caches that `cache` consists of.

    Raises:
        PartitionError: It is of a class that keeps more than layers.
    """
    parts: list[Cache] = [cache]
    if type(cache) is EncoderDecoderCache:
        parts = [cache.self_attention_cache, cache.cross_attention_cache]
    for part in parts:
        if type(part) not in (Cache, DynamicCache):
            raise PartitionError(
                f"A {type(part).__name__} cannot be kept in two halves. Possible: DynamicCache, and "
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
        remote.parts.append([_described(layer) for layer in part.layers])
        leader = True
        for index in layers:
            kind, options = remote.parts[number][index]
            if kind == "DummyLayer":
                continue
            stand_in = _remote_kind(kind)(**options)
            stand_in.remote, stand_in.part, stand_in.leads = remote, number, leader
            stand_in.length = 0
            part.layers[index] = stand_in
            leader = False
    cache.vflair_remote = remote  # type: ignore[attr-defined]
    return remote


def _described(layer: Any) -> list[Any]:
    kind = type(layer).__name__
    if kind not in KINDS:
        raise PartitionError(
            f"A cache of {kind} cannot be kept in two halves. Possible: {', '.join(KINDS)}. "
            'Generate with cache_implementation="dynamic" or use_cache=False.'
        )
    return [kind, {option: getattr(layer, option) for option in KINDS[kind][1]}]


def advance(cache: Cache, positions: int) -> None:
    """Count `positions` new positions in the absent layers; cross-attention keeps the encoder's."""
    for layer in parts_of(cache)[0].layers:
        if isinstance(layer, RemoteLayer):
            layer.advance(positions)


def build(parts: Any) -> Cache:
    """Build the model party's half from the description that `attach` wrote."""
    made = []
    for part in parts:
        if len(part) > MAX_LAYERS:
            raise ProtocolError(f"A cache may have {MAX_LAYERS} layers, not {len(part)}.")
        made.append(Cache(layers=[_built(layer) for layer in part]))
    match made:
        case [only]:
            return only
        case [own, cross]:
            return EncoderDecoderCache(own, cross)
        case _:
            raise ProtocolError(f"A cache has one part or two, not {len(made)}.")


def _built(layer: Any) -> Any:
    match layer:
        case [str() as kind, dict() as options] if (
            kind in KINDS
            and set(options) == set(KINDS[kind][1])
            and all(type(value) is int and 1 <= value < 2**31 for value in options.values())
        ):
            return KINDS[kind][0](**options)
        case _:
            raise ProtocolError(f"{layer!r} is not a cache layer. Possible: {', '.join(KINDS)}.")


def repeat(cache: Cache, deeds: Any, held_layers: Sequence[int]) -> None:
    """Do to the model party's half what was done to the data party's."""
    parts = parts_of(cache)
    for deed in deeds:
        match deed:
            case [0 | 1 as number, str() as what, detail] if number < len(parts):
                for index in held_layers:
                    _do(parts[number].layers[index], what, detail)
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
    return any(isinstance(layer, linear) for part in parts_of(cache) for layer in part.layers)
