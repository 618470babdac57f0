"""A model party's side of exactly once, as the contract states it: a repeated message gets the stored reply."""

from __future__ import annotations

import threading
from collections import Counter

from vflair_core.errors import ProtocolError, SessionLostError


class Repeatable:
    """Wraps a `handle` and counts what was carried out, by kind."""

    def __init__(self, handle):
        self.handle, self.done, self.replies = handle, Counter(), {}
        self.repeated = 0
        self._lock = threading.Lock()

    def __call__(self, message):
        with self._lock:
            seq, reply = self.replies.get(message.session, (None, None))
            if seq == message.seq and reply.kind == message.kind:
                self.repeated += 1
                return reply
            if message.kind != "open":
                if seq is None:
                    raise SessionLostError(f"There is no session {message.session[:8]}.")
                if message.seq != seq + 1:
                    raise ProtocolError(f"Message {message.seq} does not follow {seq}.")
            reply = self.handle(message)
            self.done[message.kind] += 1
            self.replies[message.session] = message.seq, reply
            return reply
