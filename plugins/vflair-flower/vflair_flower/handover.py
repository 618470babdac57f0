"""How a node is told where the model party is: an address, an authority and a token of its own, in a message of Flower."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from attrs import field, frozen
from flwr.app import ConfigRecord, RecordDict

from vflair_core import GrpcChannel, ProtocolError, connect

KEY = "vflair-handover"
URL = re.compile(r"grpc://[\w.:\[\]-]+:\d+")


def client_name(node: int) -> str:
    """What a node is called at the model party."""
    return f"node-{node}"


@frozen
class Handover:
    """What a node needs to reach the model party of a run.

    Attributes:
        url: ``grpc://HOST:PORT``.
        authority: Certificate of the authority that signed the model party's.
        token: Lets this node in, in this run.
    """

    url: str
    authority: bytes
    token: str = field(repr=False)

    def record(self) -> ConfigRecord:
        """The same for a message of Flower; the token as bytes, which Flower's logs mask."""
        return ConfigRecord(
            {"url": self.url, "authority": self.authority, "token": self.token.encode()}
        )

    @classmethod
    def of(cls, content: RecordDict) -> Handover:
        """What a message says.

        Raises:
            ProtocolError: It says nothing of it.
        """
        match content.get(KEY):
            case {"url": str(url), "authority": bytes(authority), "token": bytes(token)}:
                if not URL.fullmatch(url):
                    # Options in it would name files of this node.
                    raise ProtocolError(
                        f"{url!r:.80} is no place to go to: grpc://HOST:PORT was due, without options."
                    )
                return cls(url, authority, token.decode())
        raise ProtocolError(
            "The message does not say where the model party is. The run's serverapp must be one of vflair_flower."
        )

    @contextmanager
    def channel(self, timeout: float) -> Iterator[GrpcChannel]:
        """Open the way to the model party, and close it at the end; the session stays there.

        Raises:
            ChannelError: There is no way, or the token is not known there.
        """
        with tempfile.TemporaryDirectory(prefix="vflair-") as folder:
            authority = Path(folder) / "ca.pem"
            authority.write_bytes(self.authority)
            channel = connect(self.url, ca=authority, token=self.token, timeout=timeout)
        with channel:
            yield channel
