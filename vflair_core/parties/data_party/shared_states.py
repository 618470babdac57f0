"""A store that blocks share among themselves (the keys and values that later blocks use again), in two halves.

What the data party's blocks put in crosses as it is when the first held block gets the store. What the model party's
blocks put in comes back with the answer, if blocks of the data party follow that may read it.
"""

from __future__ import annotations

import functools
from collections import UserDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from vflair_core.communication.program import tensors_of
from vflair_core.errors import PartitionError


def open_store(store: UserDict[str, Any]) -> dict[str, Any]:
    """Make ready for held blocks to write to `store`; return its entries, whose shapes its `shadow` has from then on."""
    if not hasattr(store, "shadow"):
        store.__class__ = _halved(type(store))
    facts: Any = store
    facts.shadow = {key: _on_meta(value) for key, value in store.data.items()}
    facts.before = dict(facts.shadow)
    return dict(store.data)


def shadow_of(store: UserDict[str, Any]) -> dict[str, Any]:
    """Return the entries without their data, for the skeletons of blocks to read and write."""
    facts: Any = store
    shadow: dict[str, Any] = facts.shadow
    return shadow


def written(after: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of a store that are not those it had before."""
    return {key: value for key, value in after.items() if before.get(key) is not value}


def coming_back(store: UserDict[str, Any] | None) -> list[Tensor]:
    """Shapes of what held blocks wrote since `open_store`."""
    facts: Any = store
    return [] if store is None else tensors_of(written(facts.shadow, facts.before))


def fill(store: UserDict[str, Any] | None, answer: Iterator[Tensor]) -> None:
    """Put in what came back."""
    facts: Any = store
    if store is not None:
        for key, value in written(facts.shadow, facts.before).items():
            store.data[key] = _with(value, lambda _: next(answer))


def _on_meta(value: Any) -> Any:
    return _with(value, lambda tensor: torch.empty_like(tensor, device="meta"))


def _with(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    return type(value)(_with(item, change) for item in value)


@functools.cache
def _halved(kind: type) -> Any:
    def missing(_self: Any, key: str) -> Any:
        raise PartitionError(
            f"A block of the data party needs {key!r}, which a block of the model party computed and did not send "
            "back. Choose a cut after the last block that shares its states, or HT."
        )

    return type(kind.__name__, (kind,), {"__missing__": missing})
