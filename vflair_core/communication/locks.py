"""A lock for objects that may be copied with what refers to them."""

from __future__ import annotations

import threading
from typing import Any


class Lock:
    """Lets one thread in at a time, the same one as often as it likes; a deep copy is a lock of its own."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __deepcopy__(self, _memo: dict[int, Any]) -> Lock:
        return Lock()
