"""A process that ends with an open channel ends, and says nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("grpc")

from vflair_core import ProtocolError, serve


def refusing(message):
    raise ProtocolError(f"no {message.kind} here")


@pytest.mark.parametrize("last", ["", "import sys; sys.exit(3)", "raise SystemExit(3)"])
def test_a_process_ends_though_nobody_closed_its_channel(last):
    with serve(refusing, "127.0.0.1:0", plaintext=True) as server:
        url = f"grpc://127.0.0.1:{server.port}?plaintext=true"
        code = f"from vflair_core import connect\nchannel = connect({url!r})\n{last}"
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == (3 if last else 0)
    assert not done.stderr  # as when gRPC is asked to close what it has no threads for any more
