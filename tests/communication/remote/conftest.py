"""Servers on loopback that are stopped again, with nothing left of them."""

from __future__ import annotations

import contextlib
import threading
import time

import pytest

from vflair_core import connect, serve


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    before = set(threading.enumerate())
    yield
    until = time.monotonic() + 30
    while (left := set(threading.enumerate()) - before) and time.monotonic() < until:
        time.sleep(0.01)
    assert not left


@pytest.fixture
def serving():
    """A factory: serving(handle, ...) starts a server in this process."""
    with contextlib.ExitStack() as stack:

        def make(handle, **options):
            options.setdefault("plaintext", True)
            server = stack.enter_context(serve(handle, "127.0.0.1:0", **options))
            stack.callback(server.stop, 0)
            return server

        yield make


@pytest.fixture
def connected():
    """A factory: connected(port, ...) opens a channel to a port of this machine."""
    with contextlib.ExitStack() as stack:

        def make(port, **options):
            options.setdefault("plaintext", True)
            options.setdefault("timeout", 20)
            return stack.enter_context(connect(f"grpc://127.0.0.1:{port}", **options))

        yield make
