"""Hosts an active adversary in a process of its own, which :mod:`~vflair_core.attacks.fence` starts.

Like the worker of attacks it holds what is granted, and no truth; what crosses reaches it through its pipes, frame by
frame: a request and its honest reply go in, the reply that the data party gets comes out.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen
from typing import IO, Any

import torch
from attrs import frozen
from safetensors.torch import load, save
from torch import Tensor

from vflair_core.attacks.adversary import Adversary, Tampered, honestly
from vflair_core.attacks.attack import Launch, call
from vflair_core.attacks.evidence import Evidence, needed, save_evidence
from vflair_core.attacks.fork_server import Forked
from vflair_core.attacks.grants import GrantedKnowledge
from vflair_core.attacks.isolation import Isolation, failure_in, reporting, started
from vflair_core.attacks.scratch import scratch_folder
from vflair_core.attacks.workspace import Workspace, write_workspace
from vflair_core.communication.codec import decode, encode
from vflair_core.communication.message import Message
from vflair_core.errors import AttackError
from vflair_core.offers import load_target


@contextmanager
def hosted_adversary(
    evidence: Evidence,
    opening: Launch,
    *,
    isolation: Isolation,
    threads: int,
    device: torch.device,
) -> Iterator[Callable[[], dict[str, Tensor]]]:
    """Put the adversary of `opening` in the model party's place; yield what tells its state.

    `evidence` holds what there is before anything crosses; of it the adversary gets what it is granted.

    Raises:
        AttackError: It asks for more than it is granted, fails, or answers what is no answer.
    """
    party = evidence.party
    with scratch_folder() as scratch:
        store, folder = scratch / "store", scratch / "granted"
        folder.mkdir()
        save_evidence(store, evidence, needed([opening]))
        write_workspace(folder, store, [opening], threads, device)
        with (_inline if isolation == "inline" else _in_process)(folder) as host:
            channel = Tampered(party.connection.channel, host.tamper)
            party.channel = party.connection.channel = channel
            try:
                yield host.state
            finally:
                # What a defense measures of itself afterwards crosses as it should.
                channel.tamper = honestly


def _build(folder: Path) -> Adversary:
    """Make the adversary that the job in a folder describes, with what is granted there."""
    workspace = Workspace(folder)
    (spec,) = workspace.job["attacks"]
    attack: Any = load_target(spec["target"])(**spec["options"])
    torch.manual_seed(spec["seed"])
    adversary = call(attack.adversary, GrantedKnowledge(workspace, spec, "main", lambda *_: None))
    if not isinstance(adversary, Adversary):
        raise AttackError(
            f"{spec['target']}.adversary returned a {type(adversary).__name__}, not an Adversary."
        )
    return adversary


def _kept(adversary: Adversary) -> dict[str, Tensor]:
    """Its state, on the CPU wherever it computes."""
    return {name: value.cpu().contiguous() for name, value in adversary.state().items()}


@frozen(eq=False)
class _Inline:
    """The adversary in this process: for notebooks and objects that cannot be imported."""

    adversary: Adversary

    def state(self) -> dict[str, Tensor]:
        return _kept(self.adversary)

    def tamper(self, request: Message, reply: Message) -> Message:
        with torch.random.fork_rng(), torch.enable_grad():
            return self.adversary.tamper(request, reply)


@contextmanager
def _inline(folder: Path) -> Iterator[_Inline]:
    with torch.random.fork_rng():
        adversary = _build(folder)
    yield _Inline(adversary)


@frozen(eq=False)
class _Process:
    """The adversary in a process that holds its folder and sees the messages."""

    folder: Path
    process: Popen[bytes] | Forked

    def tamper(self, request: Message, reply: Message) -> Message:
        return decode(self._ask(encode(request), encode(reply)))

    def state(self) -> dict[str, Tensor]:
        """What the adversary learned so far."""
        return load(self._ask(b""))

    def _ask(self, *frames: bytes) -> bytes:
        assert self.process.stdin is not None  # PIPE was asked for
        assert self.process.stdout is not None
        try:
            for frame in frames:
                _write(self.process.stdin, frame)
            answer = _read(self.process.stdout)
        except BrokenPipeError:
            answer = None
        if answer is None:
            failure = failure_in(self.folder, self.process.wait())
            lines = [f"The adversary failed: {failure.error}", failure.traceback]
            raise AttackError("\n".join(line for line in lines if line))
        return answer


@contextmanager
def _in_process(folder: Path) -> Iterator[_Process]:
    # Its pipes are closed on the way out, at which it ends.
    with started("vflair_core.attacks.adversary_host", folder) as process:
        yield _Process(folder, process)


def _write(pipe: IO[bytes], frame: bytes) -> None:
    pipe.write(len(frame).to_bytes(8, "little"))
    pipe.write(frame)
    pipe.flush()


def _read(pipe: IO[bytes]) -> bytes | None:
    """Return the next frame; None if the other end is gone."""
    size = pipe.read(8)
    if len(size) < 8:
        return None
    length = int.from_bytes(size, "little")
    frame = pipe.read(length)
    return frame if len(frame) == length else None


def _serve(adversary: Adversary, requests: IO[bytes], replies: IO[bytes]) -> None:
    """Answer until the pipe is closed; an empty request asks for the state."""
    while (frame := _read(requests)) is not None:
        if not frame:
            _write(replies, save(_kept(adversary)))
            continue
        honest = _read(requests)
        if honest is None:
            return
        _write(replies, encode(adversary.tamper(decode(frame), decode(honest))))


def main(folder: Path) -> int:
    """Entry point of the process."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a plugin prints must not end up among the frames
    return reporting(folder, lambda: _serve(_build(folder), sys.stdin.buffer, replies))
