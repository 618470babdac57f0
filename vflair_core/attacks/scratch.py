"""Folders that hold what an attack may see for as long as it runs, and go away with this process, however it ends.

A process that is killed removes nothing. So a small one stands beside it, which is told of each folder before it is
made; when the pipe between them closes, it removes those that are left.
"""

from __future__ import annotations

import atexit
import json
import os
import secrets
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen

from attrs import define, field

KEEPER = """
import json, os, shutil, sys, time
folders = set()
for line in sys.stdin:
    keep, path = json.loads(line)
    (folders.add if keep else folders.discard)(path)
deadline = time.monotonic() + 60
while time.monotonic() < deadline and any(map(os.path.lexists, folders)):
    for path in folders:  # an attack that is being ended may write meanwhile
        shutil.rmtree(path, ignore_errors=True)
    time.sleep(0.05)
"""


@define
class Keeper:
    """The process that removes what this one leaves; it is started when there is something to remove."""

    _process: Popen[bytes] | None = None
    _owner: int = 0  # a fork of this process has no keeper
    _folders: set[str] = field(factory=set)
    _lock: threading.Lock = field(factory=threading.Lock)

    def keep(self, folder: Path) -> None:
        """Remove `folder` when this process has ended."""
        with self._lock:
            if self._owner != os.getpid():
                self._process, self._owner, self._folders = None, os.getpid(), set()
            self._folders.add(str(folder))
            if self._process is None or self._process.poll() is not None:
                self.close()
                self._start()
            else:
                self._tell(str(folder), keep=True)

    def forget(self, folder: Path) -> None:
        """It is gone."""
        with self._lock:
            self._folders.discard(str(folder))
            if self._process is not None and self._process.poll() is None:
                self._tell(str(folder), keep=False)

    def close(self) -> None:
        """Let it end, which removes what is left."""
        if self._process is not None and self._owner == os.getpid():
            self._process.communicate()  # closes its pipe
            self._process = None
            atexit.unregister(self.close)

    def _start(self) -> None:
        self._process = Popen(  # noqa: S603 - our own words
            [sys.executable, "-I", "-S", "-c", KEEPER],
            stdin=PIPE,
            stdout=DEVNULL,
            stderr=DEVNULL,
            cwd="/",
            start_new_session=True,  # what is sent to this process and its group does not reach it
        )
        atexit.register(self.close)
        for folder in self._folders:
            self._tell(folder, keep=True)

    def _tell(self, folder: str, *, keep: bool) -> None:
        assert self._process is not None  # it was started
        assert self._process.stdin is not None  # a pipe was asked for
        self._process.stdin.write(json.dumps([keep, folder]).encode() + b"\n")
        self._process.stdin.flush()


KEEPING = Keeper()


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yield a folder that nobody else may enter; afterwards it is gone, and also if this process is killed."""
    folder = Path(tempfile.gettempdir(), f"vflair-{secrets.token_hex(8)}")
    KEEPING.keep(folder)
    try:
        folder.mkdir(mode=0o700)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():  # else the keeper tries again
            KEEPING.forget(folder)
