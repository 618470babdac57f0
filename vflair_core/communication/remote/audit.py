"""Who asked for what, one JSON object a line: never what crossed, never a token, never a word of a text."""

from __future__ import annotations

import datetime as dt
import json
import os
import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vflair_core.errors import VflairError
from vflair_core.events import events

if TYPE_CHECKING:
    from vflair_core.communication.remote.served_stream import Served

log = events(__name__)
ISSUED = re.compile("[0-9a-f]{32,}")
LONG = 16  # of a session's name: enough to tell it from others


class Audit:
    """A file that only grows.

    `reopen` goes on in a new file where the old one was moved away. A line that cannot be written, as on a full disk, is
    lost, counted, and reported in the log.

    Raises:
        VflairError: The file cannot be opened.
    """

    def __init__(self, file: str | Path) -> None:
        self._file = Path(file)
        self._lock = threading.Lock()
        self._descriptor = self._open()
        self.lost = 0

    def __call__(self, served: Served) -> None:
        """Write down that a message was answered or refused."""
        self._write(
            {
                "what": "message",
                "client": served.client,
                # One that no server issued is the client's own text.
                "session": served.session[:LONG] if ISSUED.fullmatch(served.session) else None,
                "kind": served.kind,
                "received": served.received,
                "sent": served.sent,
                "seconds": round(served.seconds, 6),
                "refused": served.refused,
            }
        )

    def not_admitted(self, certificate: str | None, reason: str) -> None:
        """Write down that somebody was not let in: the name in the certificate, if there was one, and why."""
        self._write({"what": "not_admitted", "client": certificate, "refused": reason})

    def reopen(self) -> None:
        """Go on in the file that is there now, or a new one.

        Raises:
            VflairError: It cannot be opened; the one of before goes on.
        """
        with self._lock:
            before, self._descriptor = self._descriptor, self._open()
            os.close(before)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            os.close(self._descriptor)
            self._descriptor = -1

    def _open(self) -> int:
        try:
            return os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise VflairError(
                f"The audit cannot be written to {self._file}: {error.strerror}. Give a file in a folder that is there and "
                "that this user may write to."
            ) from error

    def _write(self, facts: dict[str, Any]) -> None:
        now = dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds")
        line = (json.dumps({"time": now, **facts}) + "\n").encode()
        with self._lock:
            try:
                done = os.write(self._descriptor, line)  # at once, so that lines never mix
            except OSError as error:
                done, why = 0, error.strerror
            else:
                why = "the disk took a part of a line only"
            if done < len(line):
                self.lost += 1
        if done < len(line):
            log.warning("audit_line_lost", why=why, lost=self.lost)
