"""What a process leaves behind that ends while an attack runs: no process of it, and no folder with what it may see."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vflair_core.attacks.scratch import scratch_folder

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a new Python is started")

RUN = """
import pathlib, sys, time
from vflair_core.attacks.fork_server import ForkServer
from vflair_core.attacks.isolation import environment
from vflair_core.attacks.scratch import scratch_folder
with scratch_folder() as folder:
    (folder / "busy.py").write_text('''
import os, pathlib, subprocess, sys, time
def main(module, folder):
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    pathlib.Path(folder, "numbers").write_text(f"{os.getpid()} {other.pid}")
    time.sleep(600)
''')
    with open(folder / "errors", "w") as errors:
        process = ForkServer().start("busy", "", folder, environment(), errors)
    while not (folder / "numbers").exists() or not (folder / "numbers").read_text():
        time.sleep(0.02)
    print((folder / "numbers").read_text(), folder, flush=True)
    WAIT
"""


def started(temporary: Path, wait: str) -> tuple[subprocess.Popen, list[int], Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", RUN.replace("WAIT", wait)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
        start_new_session=True,
    )
    *numbers, folder = process.stdout.readline().split()
    return process, [int(number) for number in numbers], Path(folder)


def is_running(number: int) -> bool:
    """A process that nobody waits for stays as a zombie."""
    status = Path("/proc", str(number), "stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def await_end(numbers: list[int], folder: Path, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and (any(map(is_running, numbers)) or folder.exists()):
        time.sleep(0.05)
    assert not [number for number in numbers if is_running(number)]
    assert not folder.exists()


@pytest.mark.parametrize(
    ("send", "number"),
    [(os.kill, signal.SIGKILL), (os.killpg, signal.SIGKILL), (os.kill, signal.SIGINT)],
    ids=["killed", "killed with its group", "interrupted"],
)
def test_a_run_that_is_killed_leaves_no_process_and_no_folder(tmp_path, send, number):
    process, numbers, folder = started(tmp_path, "time.sleep(600)")
    assert all(map(is_running, numbers))
    send(process.pid, number)
    with process.stdout:
        process.wait()
    await_end(numbers, folder)
    assert not list(tmp_path.glob("vflair-*"))


def test_an_attack_that_is_given_up_ends_with_what_it_started(tmp_path):
    process, numbers, folder = started(
        tmp_path, "process.kill(); print(process.wait(), flush=True)"
    )
    with process.stdout:
        assert process.stdout.read().split() == ["-9"]
    assert process.wait() == 0
    await_end(numbers, folder)


def test_a_folder_is_closed_to_others_and_gone_when_its_time_is_over():
    with scratch_folder() as folder:
        (folder / "a").mkdir()
        assert folder.stat().st_mode & 0o777 == 0o700
    assert not folder.exists()
    with pytest.raises(KeyError), scratch_folder() as folder:
        raise KeyError
    assert not folder.exists()
