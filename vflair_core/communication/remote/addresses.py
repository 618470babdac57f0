"""Addresses as people write them: ``grpc://host:port``, with options after a question mark."""

from __future__ import annotations

import ipaddress
from urllib.parse import parse_qsl, urlsplit

from attrs import frozen

from vflair_core.errors import ChannelError, alternatives

OPTIONS = (
    "ca",
    "certificate",
    "key",
    "token_file",
    "wire_dtype",
    "timeout",
    "plaintext",
)
EXAMPLE = "grpc://models.example.org:8443"


@frozen
class Address:
    """A host, a port, and the options that stood in the URL."""

    host: str
    port: int
    options: dict[str, str]

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def of_url(cls, url: str) -> Address:
        """Read ``grpc://host:port?option=value&…``.

        Raises:
            ChannelError: It is none, or an option is unknown.
        """
        if "@" in url.partition("?")[0]:
            raise ChannelError(
                f"A URL names no user and no password: a token stands in a file, {EXAMPLE}?token_file=FILE."
            )
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
            given = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
        except ValueError as error:
            raise ChannelError(f"{url!r} is no URL: {error}. Write e.g. {EXAMPLE!r}.") from error
        whole = parts.scheme == "grpc" and host and port and parts.path in ("", "/")
        if not whole or parts.fragment or not host or not port:
            raise ChannelError(
                f"{url!r} does not say where the model party is. Write grpc://HOST:PORT, e.g. {EXAMPLE!r}."
            )
        options = dict(given)
        for name in options:
            if name not in OPTIONS:
                raise ChannelError(
                    f"There is no option {name!r} of a URL.{alternatives(name, OPTIONS)}"
                )
        return cls(host, port, options)

    @classmethod
    def to_listen(cls, text: str) -> Address:
        """Read ``HOST:PORT``; port 0 takes a free one.

        Raises:
            ChannelError: It is none.
        """
        try:
            parts = urlsplit(f"//{text}")
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise ChannelError(f"{text!r} is not HOST:PORT: {error}.") from error
        if not host or port is None or parts.path or parts.query:
            raise ChannelError(f"{text!r} is not HOST:PORT. Write e.g. '0.0.0.0:8443'.")
        return cls(host, port, {})

    @property
    def is_loopback(self) -> bool:
        """Whether nothing that goes there leaves this machine."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def check_plaintext(self) -> None:
        """See that nothing would be sent in the clear between machines.

        Raises:
            ChannelError: It would.
        """
        if not self.is_loopback:
            raise ChannelError(
                f"{self} is not on this machine, and without TLS everybody on the way could read and change what crosses. "
                "Use TLS; plaintext is for loopback addresses only (127.0.0.1, ::1, localhost)."
            )
