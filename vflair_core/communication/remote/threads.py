"""Threads for streams: one for each, as long as it lasts, and none that keeps a process from ending."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any


class StreamThreads(Executor):
    """What gRPC runs its handlers in. A pool of Python's own would wait for its threads when the process ends."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._threads: set[threading.Thread] = set()
        self._lock = threading.Lock()

    def submit(self, act: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run `act` in a thread of its own."""
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(act(*args, **kwargs))
            except BaseException as error:  # noqa: BLE001 - whoever has the future gets it
                future.set_exception(error)
            finally:
                with self._lock:
                    self._threads.discard(threading.current_thread())

        thread = threading.Thread(target=run, name=self._name, daemon=True)
        with self._lock:
            self._threads.add(thread)
        thread.start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: FBT001, FBT002 - as `Executor` has it
        """Wait for the threads that there are."""
        with self._lock:
            left = list(self._threads)
        for thread in left if wait else ():
            thread.join()
