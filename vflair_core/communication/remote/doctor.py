"""The way to a model party, step by step: what holds, what does not, and what to do about it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

from attrs import Factory, define, frozen

from vflair_core.communication.remote import frames, handshake
from vflair_core.communication.remote.addresses import Address
from vflair_core.communication.remote.client import GrpcChannel, connect
from vflair_core.communication.remote.probe import load, round_trip
from vflair_core.communication.remote.tls import (
    SOON,
    Facts,
    read_authority,
    read_facts,
    read_identity,
)
from vflair_core.communication.wire_dtype import WIRE_DTYPES, WireDtype
from vflair_core.errors import ChannelError, VflairError

ROUNDS = 20
PATIENCE = 30.0  # seconds for a reply
PROXY = "but gRPC goes through the proxy that {} names, unless no_proxy has this host: if a later step fails, add it there"
FILES = ("ca", "certificate", "key")

Model = Callable[[GrpcChannel], str]
"""Says that the model party holds the other half of a model, or raises."""


@frozen
class Step:
    """One thing that was looked at."""

    name: str
    well: bool
    text: str


def examine(
    url: str,
    *,
    ca: str | Path | None = None,
    certificate: str | Path | None = None,
    key: str | Path | None = None,
    token: str | None = None,
    plaintext: bool = False,
    rounds: int = ROUNDS,
    model: Model | None = None,
) -> Iterator[Step]:
    """Go the way to a model party, and end where it does not go on.

    Args:
        url: As `connect` takes it, with its options or without; the others, too.
        ca: File of the authority that the server's certificate comes from.
        certificate: File of the client's own certificate.
        key: File of its key.
        token: That names this client.
        plaintext: Do without TLS, to a loopback address.
        rounds: Messages of which the round trip is the median.
        model: Called with a channel at the end.
    """
    given = {"ca": ca, "certificate": certificate, "key": key, "token": token}
    options = {name: value for name, value in given.items() if value is not None}
    way = _Way(url, options | ({"plaintext": True} if plaintext else {}), rounds, model)
    try:
        for name, act in way.steps():
            try:
                text = act()
            except VflairError as error:
                yield Step(name, well=False, text=str(error))
                if name in ("address", "resolve", "connect", "credentials", "tls", "greeting"):
                    return  # what follows goes over it
            else:
                yield Step(name, well=True, text=text)
    finally:
        way.close()


@define
class _Way:
    """What is known of the way so far."""

    url: str
    options: Mapping[str, Any]
    rounds: int
    model: Model | None
    address: Address = Factory(lambda: Address("", 0, {}))
    channel: GrpcChannel | None = None

    def steps(self) -> Iterator[tuple[str, Callable[[], str]]]:
        yield "address", self._read
        yield "resolve", lambda: ", ".join(handshake.resolve(self.address.host, self.address.port))
        yield "connect", self._connect
        yield "credentials", self._credentials
        yield "tls", self._tls
        yield "greeting", self._greeting
        yield "round trip", self._round_trip
        for wire_dtype in WIRE_DTYPES:
            yield f"as {wire_dtype}", partial(self._throughput, wire_dtype)
        if self.model is not None:
            yield "model", partial(self._holds, self.model)

    def close(self) -> None:
        if self.channel is not None:
            self.channel.close()

    def _file(self, name: str) -> str | None:
        found = self.options.get(name) or self.address.options.get(name)
        return None if found is None else str(found)

    @property
    def _clear(self) -> bool:
        return (
            "plaintext" in self.options
            or self.address.options.get("plaintext", "").lower() == "true"
        )

    def _read(self) -> str:
        self.address = Address.of_url(self.url)
        place, _, query = self.url.partition("?")
        ours = [pair for pair in parse_qsl(query) if pair[0] not in ("wire_dtype", "timeout")]
        self.url = f"{place}?{urlencode(ours)}" if ours else place  # those two are chosen here
        return str(self.address)

    def _connect(self) -> str:
        with handshake.connect(self.address.host, self.address.port) as reached:
            found = f"reached {reached.getpeername()[0]}, port {self.address.port}"
        proxy = None if self.address.is_loopback else _proxy()
        return found if proxy is None else f"{found}; {PROXY.format(proxy)}"

    def _credentials(self) -> str:
        if self._clear:
            return "none asked for: plaintext"
        told = []
        ca, certificate, key = (self._file(name) for name in FILES)
        if ca is not None:
            read_authority(ca)
            told.append(f"authority {_told(read_facts(ca))}")
        if (certificate is None) != (key is None):
            raise ChannelError("A client's certificate and its key are given together, or neither.")
        if certificate is not None and key is not None:
            read_identity(certificate, key, "client")
            told.append(f"client {_told(read_facts(certificate))}")
        token = "token" in self.options or "token_file" in self.address.options
        return "; ".join([*told, "a token" if token else "no token"])

    def _tls(self) -> str:
        if self._clear:
            self.address.check_plaintext()
            handshake.greet_in_the_clear(self.address.host, self.address.port)
            return "none: plaintext, on this machine"
        shaken = handshake.shake_hands(
            self.address.host,
            self.address.port,
            authority=self._file("ca"),
            certificate=self._file("certificate"),
            key=self._file("key"),
        )
        names = ", ".join(shaken.certificate.names)
        return f"{shaken.version} in {shaken.seconds * 1000:.0f} ms; {_told(shaken.certificate)}, for {names}"

    def _open(self, wire_dtype: WireDtype) -> GrpcChannel:
        self.close()
        self.channel = None
        self.channel = connect(self.url, wire_dtype=wire_dtype, timeout=PATIENCE, **self.options)
        return self.channel

    def _greeting(self) -> str:
        channel = self._open("float32")
        there = channel.server_version
        versions = "on both sides" if there == frames.INSTALLED else f"here, {there} there"
        return (
            f"let in; protocol {frames.VERSION}, vflair {frames.INSTALLED} {versions}; messages of at most "
            f"{channel.message_bytes / 2**20:,.0f} MiB"
        )

    def _round_trip(self) -> str:
        assert self.channel is not None
        median, slowest = round_trip(self.channel, self.rounds)
        return (
            f"{median * 1000:.1f} ms, the median of {self.rounds} (slowest {slowest * 1000:.1f} ms): a step of a generation "
            "takes this and what both parties compute"
        )

    def _throughput(self, wire_dtype: WireDtype) -> str:
        channel = self._open(wire_dtype)
        size, seconds = load(channel)
        rate = 2 * size / 2**20 / seconds
        return f"{size / 2**20:.0f} MiB of hidden states there and back in {seconds * 1000:.0f} ms, {rate:,.0f} MiB/s of them"

    def _holds(self, model: Model) -> str:
        return model(self._open("float32"))


def _proxy() -> str | None:
    """The variable by which gRPC goes through a proxy, if there is one."""
    names = ("grpc_proxy", "https_proxy", "http_proxy")
    return next((name for name in names if os.environ.get(name)), None)


def _told(facts: Facts) -> str:
    """A certificate in a few words, with a warning where it ends soon."""
    of = "" if facts.issuer == facts.subject else f" of {facts.issuer!r}"
    soon = ": renew it" if facts.days_left < SOON else ""
    return f"{facts.subject!r}{of}, {facts.days_left} days left{soon}"
