"""Either party of a tiny run in a process that is started anew whenever it is killed: run by test_kills.

The one that starts them has imported everything and never used gRPC, so that a new one is there at once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

from vflair_core import ChannelError, FineTuning, Partition, Train, connect, serve, split
from vflair_core.testing import tiny_batch, tiny_model

CUT = Partition(1, 1)
DROPOUT = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}


def model():
    return tiny_model("gpt2", **DROPOUT)


def batch_of(step):
    return tiny_batch(model(), labels="tokens", seed=step)


def options_of(steps):
    return Train(steps=steps, optimizer="adamw", learning_rate=0.01, schedule="cosine")


def model_party(folder: Path, port: int, _steps: int) -> None:
    """Serve until killed."""
    torch.manual_seed(3)
    _, party = split(model(), CUT)
    party.checkpoints = folder / "theirs"
    server = serve(party.handle, f"127.0.0.1:{port}", plaintext=True, secret=b"known again")
    (folder / "ready").write_text(str(os.getpid()))
    server.wait()


def connected(port: int):
    """The way to the model party, which may be starting anew."""
    until = time.monotonic() + 60
    while True:
        try:
            return connect(f"grpc://127.0.0.1:{port}", plaintext=True, timeout=60)
        except ChannelError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)


def data_party(folder: Path, port: int, steps: int) -> None:
    """Take all steps, whatever happens; note each loss."""
    torch.manual_seed(3)
    channel = connected(port)
    party, _ = split(model(), CUT, channel=channel)
    tuning = FineTuning(party, options_of(steps))
    losses = tuning.run(batch_of, folder / "ours", every=2, patience=60)
    weights = {name: weight.detach() for name, weight in party.named_parameters()}
    torch.save(weights, folder / "weights.pt")
    (folder / "losses.json").write_text(json.dumps({k: v.hex() for k, v in losses.items()}))
    channel.close()


def main(role: str, folder: Path, port: int, steps: int) -> int:
    torch.set_num_threads(1)
    child = 0
    signal.signal(signal.SIGTERM, lambda *_: (os.kill(child, signal.SIGKILL), os._exit(0)))
    while True:
        child = os.fork()
        if not child:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            {"model": model_party, "data": data_party}[role](folder, port, steps)
            sys.stdout.flush()
            os._exit(0)
        (folder / f"{role}.pid").write_text(str(child))
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])))
