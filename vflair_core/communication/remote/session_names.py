"""Names of sessions that the server issues, and that say themselves whose they are: nothing has to be kept of them.

A name is 16 bytes that nobody can guess, and a code over them and the client's name under the server's secret. So a
server that was started anew with the same secret knows its clients' sessions again, and takes nobody else's for theirs.
"""

from __future__ import annotations

import hashlib
import hmac

from attrs import field, frozen

HALF = 32  # hexadecimal digits


@frozen
class SessionNames:
    """Issues names and recognises them.

    Args:
        secret: Known to the server alone; sessions outlive it only if it does.
    """

    secret: bytes = field(repr=False)

    def issue(self, client: str, asked: str) -> str:
        """Name a new session of `client`; the same request gets the same name, so that it may be repeated."""
        unguessable = self._code(b"issue", client, asked)
        return unguessable + self._code(b"bind", client, unguessable)

    def owns(self, client: str, session: str) -> bool:
        """Whether a session was issued to `client`."""
        if len(session) != 2 * HALF or not session.isascii():
            return False
        expected = self._code(b"bind", client, session[:HALF])
        return hmac.compare_digest(expected, session[HALF:])

    def _code(self, purpose: bytes, client: str, text: str) -> str:
        key = hmac.new(self.secret, purpose, hashlib.sha256).digest()
        named = hmac.new(key, client.encode(), hashlib.sha256).digest()
        return hmac.new(named, text.encode(), hashlib.sha256).hexdigest()[:HALF]
