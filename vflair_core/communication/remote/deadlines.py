"""What is done when something takes too long: one thread for many deadlines, which wakes when one is over."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Deadlines:
    """Calls what was asked for when its time is over, in a thread of its own, which starts with the first one.

    To set one and to take it back costs no change of threads: the thread wakes at the first that was set and looks then
    what has become of it.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._condition = threading.Condition()
        self._waiting: dict[int, tuple[float, Callable[[], object]]] = {}
        self._numbers = itertools.count()
        self._wakes = math.inf  # when the thread looks again
        self._thread: threading.Thread | None = None
        self._closed = False

    @contextmanager
    def after(self, seconds: float, act: Callable[[], object]) -> Iterator[None]:
        """Call `act` if the block takes longer than `seconds`."""
        number, moment = next(self._numbers), time.monotonic() + seconds
        with self._condition:
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._watch, name=self._name, daemon=True)
                self._thread.start()
            self._waiting[number] = (moment, act)
            if moment < self._wakes:
                self._condition.notify()
        try:
            yield
        finally:
            with self._condition:
                self._waiting.pop(number, None)

    def close(self) -> None:
        """End the thread; what still waits is not called any more."""
        with self._condition:
            self._closed = True
            self._condition.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _watch(self) -> None:
        while True:
            with self._condition:
                if self._closed:
                    return
                now = time.monotonic()
                over = [n for n, (moment, _) in self._waiting.items() if moment <= now]
                acts = [self._waiting.pop(n)[1] for n in over]
                if not acts:
                    first = min((moment for moment, _ in self._waiting.values()), default=math.inf)
                    self._wakes = first
                    self._condition.wait(None if first == math.inf else first - now)
                    self._wakes = -math.inf  # awake: nobody need wake it
            for act in acts:
                act()
