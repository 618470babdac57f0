"""Who a client is: by its token, by its certificate, or by both, which must then agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from attrs import field, frozen

from vflair_core.communication.remote.clients import check_name
from vflair_core.communication.remote.rights import Client
from vflair_core.errors import ProtocolError, VflairError

Told = Callable[[str | None, str], None]  # the name in the certificate, and why


class Tokens(Protocol):
    """Who has which token: a file of `Clients`, or `IssuedTokens`."""

    def find(self, token: str) -> Client | None:
        """The client whose token this is."""

    def named(self, name: str) -> Client | None:
        """The client of that name, if its token counts."""


def _nobody(_certificate: str | None, _reason: str) -> None:
    pass


@frozen
class Admission:
    """Lets clients in, as `serve` asks for each stream.

    Args:
        clients: Those who have tokens; None asks for no token.
        certificates: Whether TLS asks for a client's certificate, which its authority signed.
        refused: Told of each who is not let in.
    """

    clients: Tokens | None
    certificates: bool = False
    refused: Told = field(default=_nobody)

    def __call__(self, metadata: Mapping[str, str], certificate: str | None) -> Client:
        """Say who asks.

        Raises:
            ProtocolError: Nobody whom the operator knows.
        """
        try:
            return self._client(metadata, certificate)
        except VflairError as error:
            self.refused(certificate, str(error))
            raise

    def again(self, client: Client) -> Client:
        """Say what a client may do now, who was let in before.

        Raises:
            ProtocolError: It is not known any more, or its token has expired meanwhile.
        """
        now = client if self.clients is None else self.clients.named(client.name)
        if now is None:
            raise ProtocolError(
                f"Client {client.name!r} is not known here any more, or its token has expired. Its operator makes a new one: "
                "vflair token new NAME."
            )
        return now

    def _client(self, metadata: Mapping[str, str], certificate: str | None) -> Client:
        if self.certificates and certificate is None:
            raise ProtocolError(
                "The certificate names nobody: it needs one common name, that of the client."
            )
        if self.clients is None:
            if not self.certificates:
                return Client("local")
            assert certificate is not None
            check_name(certificate)
            return Client(certificate)
        token = _bearer(metadata)
        client = self.clients.find(token)
        if client is None:
            raise ProtocolError(
                "The token is not known here, or has expired. Its operator makes a new one: vflair token new NAME."
            )
        if self.certificates and certificate != client.name:
            raise ProtocolError(
                f"The token is another client's than the certificate, which is {certificate!r:.80}'s. Give the two that "
                "were made for the same client."
            )
        return client


def _bearer(metadata: Mapping[str, str]) -> str:
    scheme, _, token = metadata.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise ProtocolError(
            "This model party asks for a token. Give it: connect(..., token=...), or token_file in the URL."
        )
    return token
