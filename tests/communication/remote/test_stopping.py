"""A server that stops finishes what runs, refuses the rest by name, and leaves nothing behind."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from support.remote_messages import Talk, doubled
from support.repeated_messages import Repeatable
from vflair_core import ChannelError, Partition, SessionLostError, connect
from vflair_core.testing import remote_model_party, tiny_model

NUMBERS = torch.ones(2, 3)


class Slow:
    """A `handle` that waits in a forward until it is let go on."""

    def __init__(self):
        self.began, self.go_on = threading.Event(), threading.Event()

    def __call__(self, message):
        if message.kind == "forward":
            self.began.set()
            assert self.go_on.wait(30)
        return doubled(message)


def test_what_runs_is_finished_and_what_comes_is_refused(serving, connected):
    slow = Slow()
    server = serving(slow)
    busy, idle = Talk(connected(server.port)), Talk(connected(server.port, timeout=1))
    busy.say("open")
    idle.say("open")
    running = threading.Thread(target=busy.double, args=(NUMBERS,))
    running.start()
    assert slow.began.wait(30)
    stopping = threading.Thread(target=server.stop, args=(30,))
    stopping.start()
    while not server.stopping:
        time.sleep(0.01)
    with pytest.raises(ChannelError, match="The server is stopping"):
        idle.double(NUMBERS)
    slow.go_on.set()
    running.join(30)
    stopping.join(30)
    assert busy.seq == 2  # its reply came
    with socket.socket() as attempt:
        assert attempt.connect_ex(("127.0.0.1", server.port)) != 0


def test_what_runs_longer_than_the_grace_is_cut_off(serving, connected):
    slow = Slow()
    server = serving(slow)
    busy = Talk(connected(server.port, timeout=1))
    busy.say("open")
    failed = []

    def ask():
        try:
            busy.double(NUMBERS)
        except ChannelError as error:
            failed.append(error)

    running = threading.Thread(target=ask)
    running.start()
    assert slow.began.wait(30)
    server.stop(0.1)
    running.join(30)
    slow.go_on.set()
    assert "cannot be reached" in str(failed[0])


def test_stopping_twice_is_stopping_once(serving):
    server = serving(doubled)
    server.stop(0)
    server.stop(0)
    assert server.wait(1)


def test_a_server_says_whether_it_still_runs(serving):
    server = serving(doubled)
    assert not server.wait(0.01)


def test_a_client_goes_over_to_the_server_that_takes_the_place(serving, connected):
    from vflair_core import serve

    first, handle = serving(doubled, secret=b"s"), Repeatable(doubled)
    talk = Talk(connected(first.port))
    talk.say("open")
    first.stop(0)
    with serve(handle, f"127.0.0.1:{first.port}", plaintext=True, secret=b"s"):
        with pytest.raises(SessionLostError):
            talk.double(NUMBERS)
        talk.say("open")
        talk.double(NUMBERS)
        talk.channel.close()


def test_a_process_that_is_killed_is_a_lost_connection():
    with (
        remote_model_party(tiny_model("gpt2"), Partition(1, 1)) as remote,
        connect(remote.url, timeout=2) as channel,
    ):
        remote.process.kill()
        with pytest.raises(ChannelError, match="cannot be reached"):
            Talk(channel).say("open")


@pytest.mark.parametrize("ending", ["pass", "raise RuntimeError('on purpose')"])
def test_a_process_ends_though_its_server_and_its_channel_are_open(ending):
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent.parent.parent)!r})
from support.remote_messages import Talk, doubled
from vflair_core import connect, serve
server = serve(doubled, "127.0.0.1:0", plaintext=True)
channel = connect(f"grpc://127.0.0.1:{{server.port}}", plaintext=True)
Talk(channel).say("open")
print("done")
{ending}
"""
    ran = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120
    )
    assert ran.stdout == "done\n"
    assert ran.returncode == (0 if ending == "pass" else 1), ran.stderr
    assert ("on purpose" in ran.stderr) == (ending != "pass")
