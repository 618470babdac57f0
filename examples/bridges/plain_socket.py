"""A stack in which the server calls: the model party asks the data party for its next request, over a plain socket.

Start ``plain_socket.py data-party 4096``, then ``plain_socket.py model-party 4096``. TLS and tokens are the stack's to bring.
"""

import socket
import struct
import sys
from collections.abc import Callable
from typing import Any

from vflair_core import Channel, FineTuning, Message, Partition, Stepwise, Train, answer, split
from vflair_core.testing import tiny_batch, tiny_model

CUT = Partition(head=1, tail=1)


def _send(connection: Any, frame: bytes) -> None:
    connection.sendall(struct.pack("<Q", len(frame)) + frame)


def _receive(file: Any) -> bytes:
    return file.read(struct.unpack("<Q", file.read(8))[0])


def be_called(work: Callable[[Channel], Any], port: int) -> Any:
    """The data party is the client: called with the last reply, it returns its next request."""
    with socket.create_server(("127.0.0.1", port)) as listening:
        connection, _ = listening.accept()
        with connection, connection.makefile("rb") as file, Stepwise(work, timeout=60) as steps:
            while request := steps.next():
                _send(connection, request)
                steps.reply(_receive(file))
            _send(connection, b"")  # it is done
            return steps.result


def call(handle: Callable[[Message], Message], port: int) -> None:
    """The model party is the server: it calls until the data party has no other request."""
    with socket.create_connection(("127.0.0.1", port)) as way, way.makefile("rb") as file:
        while request := _receive(file):
            _send(way, answer(handle, request))


def fine_tune_and_generate(channel: Channel) -> tuple[list[float], list[list[int]]]:
    """What a data party does; it knows nothing of who calls whom."""
    party, _ = split(tiny_model("llama"), CUT, channel=channel)
    batch = tiny_batch(party.model, labels="tokens")
    tuning = FineTuning(party, Train(steps=3, learning_rate=1e-2))
    losses = [tuning.step(batch) for _ in range(3)]
    tokens = party.model.eval().generate(batch["input_ids"], max_new_tokens=5, do_sample=False)
    party.close()
    return losses, tokens.tolist()


if __name__ == "__main__":
    if sys.argv[1] == "data-party":
        print(be_called(fine_tune_and_generate, int(sys.argv[2])))
    else:
        call(split(tiny_model("llama"), CUT)[1].handle, int(sys.argv[2]))
