"""A model party in a process of its own, on this machine: it serves until the test is done with it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import frozen

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

    from vflair_core.partition.partition import Partition

SECONDS_TO_END = 60


@frozen
class RemoteModelParty:
    """Where a model party answers, and its process."""

    url: str  # for `connect`, and as `channel` of `split` and `load_data_party`
    process: subprocess.Popen[str]


@contextmanager
def remote_model_party(
    model: PreTrainedModel | str | Path, partition: Partition, *, trains: bool = True
) -> Iterator[RemoteModelParty]:
    """Serve the model party's part in another process, over gRPC on the loopback device; needs ``vflair-core[grpc]``.

    As in::

        model = tiny_model("llama")
        with remote_model_party(model, Partition(1, 1)) as remote:
            data_party, _ = split(model, Partition(1, 1), channel=remote.url)

    Args:
        model: A model, of which it gets a copy and the data party its part by `split`; or the folder of a checkpoint, of
            which each loads its part: the data party by `load_data_party`.
        partition: The cut.
        trains: Whether the model party's own weights are trained, or the data party's alone.
    """
    with tempfile.TemporaryDirectory() as scratch:
        given = None if isinstance(model, str | Path) else model
        if given is not None:
            given.save_pretrained(scratch)
        folder, how = (model, "load") if given is None else (scratch, type(given).__name__)
        words = [str(folder), how, str(partition.head), str(partition.tail), str(trains)]
        command = [sys.executable, "-m", __name__, *words]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:  # noqa: S603 - our own module
            assert process.stdin is not None  # pipes were asked for
            assert process.stdout is not None
            try:
                port = process.stdout.readline().strip()
                if not port:
                    raise RuntimeError("The model party did not start; standard error says why.")
                url = f"grpc://127.0.0.1:{port}?plaintext=true"
                yield RemoteModelParty(url, process)
            finally:
                process.stdin.close()  # at which it ends
                try:
                    process.wait(SECONDS_TO_END)
                except subprocess.TimeoutExpired:
                    process.kill()


def main(folder: str, how: str, head: str, tail: str, trains: str) -> None:
    """Serve until standard input ends."""
    import torch
    import transformers

    from vflair_core import Partition, load_model_party, serve, split, tune

    torch.set_num_threads(1)
    partition = Partition(int(head), int(tail))
    if how == "load":
        model_party = load_model_party(folder, partition)
    else:
        _, model_party = split(getattr(transformers, how).from_pretrained(folder), partition)
    if trains != "True":
        tune(model_party, ["data_party"])
    with serve(model_party.handle, "127.0.0.1:0", plaintext=True) as server:
        sys.stdout.write(f"{server.port}\n")
        sys.stdout.flush()
        sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
