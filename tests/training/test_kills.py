"""Either party is killed at any moment, again and again: the run ends with the weights of one that was left alone.

`VFLAIR_KILLS=100` kills as often as that (`nox -s kills`); a few times in the usual tests.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from support import mortal_parties
from vflair_core import FineTuning, connect, serve, split
from vflair_core.partition.checkpoint import MODEL_FILE, read_part, steps_in
from vflair_core.testing import tiny_batch

KILLS = int(os.environ.get("VFLAIR_KILLS", "4"))
STEPS = 10 * KILLS  # so that all of them come in time
SCRIPT = Path(mortal_parties.__file__)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def party(role, folder, port, steps=0):
    """A party that is started anew when it is killed."""
    command = [sys.executable, str(SCRIPT), role, str(folder), str(port), str(steps)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(["tests", *sys.path])}
    with subprocess.Popen(command, env=environment) as process:
        try:
            yield process
        finally:
            process.terminate()
            process.wait(30)


def kill(role, folder):
    """End what plays the role now as a power cut would."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError, ValueError):
        os.kill(int((folder / f"{role}.pid").read_text()), signal.SIGKILL)


def wait_for(path, process, seconds=120):
    until = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() in (None, 0), "it ended"
        assert time.monotonic() < until, f"no {path.name}"
        time.sleep(0.02)


def left_alone(steps):
    """Losses and weights of the run that nobody disturbs, each party with a stream of its own."""
    torch.manual_seed(3)
    _, theirs = split(mortal_parties.model(), mortal_parties.CUT)
    with serve(theirs.handle, "127.0.0.1:0", plaintext=True) as server:
        url = f"grpc://127.0.0.1:{server.port}"
        with connect(url, plaintext=True, timeout=60) as channel:
            ours, _ = split(mortal_parties.model(), mortal_parties.CUT, channel=channel)
            with torch.random.fork_rng([]):
                torch.manual_seed(3)
                tuning = FineTuning(ours, mortal_parties.options_of(steps))
                losses = [tuning.step(mortal_parties.batch_of(n)) for n in range(steps)]
        server.stop(0)
    return losses, dict(ours.named_parameters()), dict(theirs.named_parameters())


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1))
def test_training_ends_as_if_nobody_had_been_killed(tmp_path, seed):
    steps = STEPS
    chance = random.Random(seed)
    port, killed = free_port(), []
    with party("model", tmp_path, port) as model, party("data", tmp_path, port, steps) as data:
        wait_for(tmp_path / "ready", model)
        wait_for(tmp_path / "ours", data)
        while not (tmp_path / "losses.json").exists():
            assert data.poll() in (None, 0)
            if len(killed) < KILLS:
                time.sleep(chance.uniform(0.05, 1.0))
                killed.append(chance.choice(("model", "data")))
                kill(killed[-1], tmp_path)
            else:
                time.sleep(0.1)
        assert data.wait(60) == 0
    assert killed
    _, ours, theirs = left_alone(steps)
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert all(torch.equal(weights[name], weight) for name, weight in ours.items())
    (run,) = (tmp_path / "theirs").iterdir()
    _, saved = read_part(steps_in(run, MODEL_FILE)[steps])
    assert all(torch.equal(saved[name], weight) for name, weight in theirs.items())
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"num_beams": 3}, {"do_sample": True}, {}], ids=str)
def test_a_generation_ends_as_if_the_model_party_had_not_been_killed(tmp_path, how):
    port = free_port()
    whole = mortal_parties.model()
    text = tiny_batch(whole, padding="left")
    options = {"max_new_tokens": 40, "min_new_tokens": 40, **how}
    torch.manual_seed(1)
    expected = whole.generate(**text, **options)
    chance = random.Random(0)
    kills = max(2, KILLS // 3)
    with party("model", tmp_path, port) as model:
        wait_for(tmp_path / "ready", model)
        with connect(f"grpc://127.0.0.1:{port}", plaintext=True, timeout=60) as channel:
            ours, _ = split(mortal_parties.model(), mortal_parties.CUT, channel=channel)
            moments = set(chance.sample(range(2, 40), min(kills, 38)))
            said = []

            def watch(message, direction, _seconds):
                if message.kind == "forward" and direction == "sent":
                    said.append(message)
                    if len(said) in moments:
                        kill("model", tmp_path)

            with channel.tap(watch):
                torch.manual_seed(1)
                found = ours.model.generate(**text, **options)
            assert channel.connections > 1
    assert torch.equal(found, expected)
