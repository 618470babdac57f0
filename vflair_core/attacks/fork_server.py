"""Starts processes of attacks by forking one that has imported what they need: ``python -m vflair_core.attacks.fork_server FD``.

To import torch and transformers takes seconds; a fork takes none. The server holds no text, no message and no
knowledge, so the parent of an attack has nothing to tell. It serves one process, and ends with it, however that ends:
so do the attacks.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from subprocess import DEVNULL, Popen
from typing import IO

from attrs import define

IMPORTED_FIRST = "vflair_core.attacks.worker"
LONGEST = 1 << 20  # bytes of a request
LOOK_EVERY = 20  # milliseconds, for the end of a process


@define
class Forked:
    """A process that a server started, with the face of `subprocess.Popen`."""

    stdin: IO[bytes]
    stdout: IO[bytes]
    _line: (
        socket.socket
    )  # to who waits for it: its code comes from there, and it lives while ours stays open
    returncode: int | None = None

    def wait(self) -> int:
        """Wait until it has ended; return its code, negative for the signal that killed it."""
        if self.returncode is None:
            with self._line:
                self.returncode = int(self._line.recv(16) or -signal.SIGKILL)
        return self.returncode

    def kill(self) -> None:
        """End it and what it started, as the end of this process does."""
        if self.returncode is None:
            self._line.shutdown(socket.SHUT_WR)


@define
class ForkServer:
    """The server of this process; it is started when it is first asked, and again if it has died."""

    _connection: socket.socket | None = None
    _process: Popen[bytes] | None = None

    def start(
        self, entry: str, module: str, folder: Path, environment: Mapping[str, str], errors: IO[str]
    ) -> Forked:
        """Run ``entry.main(module, folder)`` in a new process, in that folder and with that environment only."""
        connection = self._connected(environment)
        stdin, to_stdin = os.pipe()
        from_stdout, stdout = os.pipe()
        line, theirs = socket.socketpair()
        request = json.dumps([entry, module, str(folder), dict(environment)]).encode()
        with theirs:
            handles = [stdin, stdout, errors.fileno(), theirs.fileno()]
            socket.send_fds(connection, [request], handles)
        for handle in (stdin, stdout):
            os.close(handle)
        return Forked(os.fdopen(to_stdin, "wb"), os.fdopen(from_stdout, "rb"), line)

    def close(self) -> None:
        """End it; attacks that run go on, each with whom it was started for."""
        if self._connection is not None and self._process is not None:
            self._connection.close()
            self._process.wait()
            self._connection = self._process = None
            atexit.unregister(self.close)

    def _connected(self, environment: Mapping[str, str]) -> socket.socket:
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._connection, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with other:
                command = [sys.executable, "-m", "vflair_core.attacks.fork_server"]
                self._process = Popen(  # noqa: S603 - our own module
                    [*command, str(other.fileno())],
                    stdin=DEVNULL,
                    pass_fds=[other.fileno()],
                    env=dict(environment),
                    cwd="/",
                    start_new_session=True,  # it hears of the end of this process by its connection only
                )
            atexit.register(self.close)
        assert self._connection is not None  # it is made with the process
        return self._connection


def serve(connection: socket.socket) -> None:
    """Fork for every request, until nobody can send one any more."""
    importlib.import_module(IMPORTED_FIRST)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for who waits for an attack
    while True:
        request, handles, _, _ = socket.recv_fds(connection, LONGEST, 4)
        if not request:
            return
        if os.fork() == 0:
            connection.close()
            _keep(json.loads(request), *handles)
        for handle in handles:
            os.close(handle)


def _keep(words: list[object], stdin: int, stdout: int, stderr: int, line: int) -> None:
    """Run one process for as long as somebody is on the line, tell its code when it has ended, and end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)  # what it starts ends with it
        for number, handle in enumerate((stdin, stdout, stderr)):
            os.dup2(handle, number)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        _become(*words)  # type: ignore[arg-type]
    for handle in (stdin, stdout, stderr):
        os.close(handle)
    try:
        _end_with_the_line(child, line)
        _, status = os.waitpid(child, 0)
        os.write(line, str(os.waitstatus_to_exitcode(status)).encode())
    finally:  # nobody may be left to tell
        os._exit(0)


def _end_with_the_line(child: int, line: int) -> None:
    """Wait until the process has ended; kill it when the other end of the line is closed, as by a process that died."""
    events = select.poll()
    events.register(line, select.POLLIN)
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if events.poll(LOOK_EVERY):
            for group in (-child, child):  # it may not have a group of its own yet
                with contextlib.suppress(ProcessLookupError):
                    os.kill(group, signal.SIGKILL)
            return


def _become(entry: str, module: str, folder: str, environment: Mapping[str, str]) -> None:
    """Turn this fork into what a new Python would be, and end with it."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[:] = [folder, *environment["PYTHONPATH"].split(os.pathsep)]
    importlib.invalidate_caches()
    code = 1
    try:
        importlib.import_module(entry).main(module, folder)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - as a Python of its own says it
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)  # it has nothing to put away
