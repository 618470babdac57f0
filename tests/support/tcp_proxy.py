"""A TCP proxy that can be told to cut a connection after some bytes, or to stall."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Self


class TcpProxy:
    """Passes on what comes to 127.0.0.1:`port`.

    Set `cut_after` to (direction, n), direction "up" or "down": the next connection's n-th byte that way is its last, and
    the rule is used up. Set `stall_after` likewise: from then on nothing passes that way, and the connection stays.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.cut_after: tuple[str, int] | None = None
        self.stall_after: tuple[str, int] | None = None
        self.connections, self.cuts = 0, 0
        self.passed = {"up": 0, "down": 0}
        self._rules = threading.Lock()
        self._closing = threading.Event()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept)]
        self._sockets: list[socket.socket] = []
        self._threads[0].start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self.drop_all()
        for thread in self._threads:
            thread.join()
        for each in self._sockets:
            each.close()

    def drop_all(self) -> None:
        """Cut all connections."""
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                near, _ = self._listening.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                near.close()
                continue
            self.connections += 1
            self._sockets += [near, far]
            for direction, source, sink in (("up", near, far), ("down", far, near)):
                thread = threading.Thread(target=self._pass, args=(direction, source, sink))
                self._threads.append(thread)
                thread.start()

    def _pass(self, direction: str, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                data, ends, stalls = self._allowed(direction, data)
                sink.sendall(data)
                if stalls:
                    self._closing.wait()
                if ends:
                    break
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _allowed(self, direction: str, data: bytes) -> tuple[bytes, bool, bool]:
        with self._rules:
            self.passed[direction] += len(data)
            for name in ("cut_after", "stall_after"):
                rule = getattr(self, name)
                if rule is None or rule[0] != direction:
                    continue
                if len(data) >= rule[1]:
                    setattr(self, name, None)
                    self.cuts += 1
                    return data[: rule[1]], name == "cut_after", name == "stall_after"
                setattr(self, name, (direction, rule[1] - len(data)))
        return data, False, False
