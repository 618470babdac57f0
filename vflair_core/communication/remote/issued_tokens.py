"""Tokens that a running program issues and withdraws: nothing is written, and they end with its process."""

from __future__ import annotations

import hmac
import threading
from collections.abc import Iterable

from attrs import frozen

from vflair_core.communication.remote.clients import check_name, digest_of, new_token
from vflair_core.communication.remote.rights import RIGHTS, Client, Right
from vflair_core.errors import VflairError


@frozen
class _Issued:
    client: Client
    sha256: str


class IssuedTokens:
    """Tokens for the length of a run, where a file of clients would outlive it.

        tokens = IssuedTokens()
        admission = Admission(tokens)
        serve(handle, listen, credentials=..., authenticate=admission, renew=admission.again)
        token = tokens.issue("alice", ["infer", "train"])

    A token that is withdrawn counts no more from the next message on. Only digests are kept.
    """

    def __init__(self) -> None:
        self._issued: dict[str, _Issued] = {}
        self._lock = threading.Lock()

    def issue(self, name: str, rights: Iterable[Right] = RIGHTS) -> str:
        """Make a token for the client `name`.

        Raises:
            VflairError: The name cannot be one, or has a token.
            ProtocolError: There is no such right.
        """
        check_name(name)
        given: set[Right] = {"infer", *rights}  # without the first nothing can be done at all
        may = frozenset(given)
        client, token = Client(name, may), new_token()  # type: ignore[arg-type]
        with self._lock:
            if name in self._issued:
                raise VflairError(
                    f"Client {name!r} has a token already. Withdraw it first, or take another name."
                )
            self._issued[name] = _Issued(client, digest_of(token))
        return token

    def withdraw(self, name: str) -> None:
        """Let the client's token, if it has one, count no more."""
        with self._lock:
            self._issued.pop(name, None)

    def find(self, token: str) -> Client | None:
        """The client whose token this is."""
        digest, found = digest_of(token), None
        for each in self._all():  # all of them: how long it takes tells nothing
            if hmac.compare_digest(each.sha256, digest):
                found = each.client
        return found

    def named(self, name: str) -> Client | None:
        """The client of that name, as long as it has a token."""
        return next((each.client for each in self._all() if each.client.name == name), None)

    def _all(self) -> list[_Issued]:
        with self._lock:
            return list(self._issued.values())
