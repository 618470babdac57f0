"""A bridge over a stack in which the server calls finds what one process finds."""

from __future__ import annotations

import ast
import importlib.util
import socket
import subprocess
import sys
import time

from support.paths import EXAMPLES
from vflair_core import LocalChannel, split

BRIDGE = EXAMPLES / "bridges" / "plain_socket.py"


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def listens(port, process):
    """Wait until the data party listens; connecting would be the one call that it takes."""
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        try:
            with socket.create_server(("127.0.0.1", port)):
                pass
        except OSError:
            return
        time.sleep(0.05)
    raise AssertionError(process.stderr.read())


def test_a_bridge_where_the_server_calls_finds_what_one_process_finds():
    spec = importlib.util.spec_from_file_location("plain_socket", BRIDGE)
    bridge = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bridge)
    _, model_party = split(bridge.tiny_model("llama"), bridge.CUT)
    local = bridge.fine_tune_and_generate(LocalChannel(model_party.handle))

    port = free_port()
    command = [sys.executable, "-W", "error", str(BRIDGE)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, "data-party", str(port)], **pipes) as data_party:
        try:
            listens(port, data_party)
            caller = subprocess.run(
                [*command, "model-party", str(port)],
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
            found, said = data_party.communicate(timeout=60)
        finally:
            data_party.kill()
    assert (caller.returncode, data_party.returncode) == (0, 0), caller.stderr + said
    assert ast.literal_eval(found) == local  # floats are written with all their digits


def test_the_bridge_has_sixty_lines():
    assert len(BRIDGE.read_text().splitlines()) <= 60
