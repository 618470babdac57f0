"""Processes of attacks come from a fork of one that has imported what they need, and are as new ones."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vflair_core.attacks import isolation
from vflair_core.attacks.fork_server import ForkServer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a new Python is started")

TOLD = """
import os, signal, sys
def main(module, folder):
    if module == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if module == "failed":
        raise ValueError("what went wrong")
    if module == "left":
        sys.exit(7)
    print(os.getcwd(), sorted(os.environ), os.getppid(), sys.stdin.buffer.read())
"""


@pytest.fixture(scope="module")
def server():
    server = ForkServer()
    yield server
    server.close()


def ask(server, folder, word, **variables):
    (folder / "told.py").write_text(TOLD)
    environment = isolation.environment() | variables
    with (folder / "errors.txt").open("w") as errors:
        process = server.start("told", word, folder, environment, errors)
    with process.stdout:
        process.stdin.write(b"a line")
        process.stdin.close()
        said = process.stdout.read().decode()
    return process.wait(), said, (folder / "errors.txt").read_text()


def test_it_has_its_folder_its_pipes_and_its_environment_only(server, tmp_path, monkeypatch):
    monkeypatch.setenv("A_TOKEN_OF_MINE", "secret")
    code, said, errors = ask(server, tmp_path, "told", AN_OWN="1")
    assert (code, errors) == (0, "")
    assert said.startswith(str(tmp_path))
    assert "AN_OWN" in said
    assert "A_TOKEN_OF_MINE" not in said
    assert said.endswith("b'a line'\n")
    assert f" {os.getpid()} " not in said  # its parent is another, which knows nothing
    assert "AN_OWN" not in ask(server, tmp_path, "told")[1]  # nor what another was given


@pytest.mark.parametrize(
    ("word", "code", "error"),
    [("killed", -9, ""), ("failed", 1, "ValueError: what went wrong"), ("left", 7, "")],
)
def test_its_end_is_told(server, tmp_path, word, code, error):
    told = ask(server, tmp_path, word)
    assert told[0] == code
    assert error in told[2]


def test_a_server_that_has_died_is_replaced(server, tmp_path):
    assert ask(server, tmp_path, "told")[0] == 0
    server._process.kill()
    server._process.wait()
    assert ask(server, tmp_path, "told")[0] == 0


def test_it_ends_with_the_process_that_it_serves():
    code = """
import os, sys, pathlib, tempfile
from vflair_core.attacks.isolation import FORK_SERVER, environment
folder = pathlib.Path(tempfile.mkdtemp())
with open(os.devnull, "w") as errors:
    FORK_SERVER.start("vflair_core.errors", "", folder, environment(), errors).wait()
print(FORK_SERVER._process.pid)
sys.stdout.flush()
os._exit(0)  # it has no time to say goodbye
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    server = int(done.stdout)
    for _ in range(300):
        if _gone(server):
            return
        time.sleep(0.1)
    raise AssertionError("the server outlived its process")


def _gone(number):
    """A process that nobody waits for stays as a zombie."""
    status = Path("/proc", str(number), "stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"
