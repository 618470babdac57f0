"""Hosts an active adversary in a process of its own: ``python -m vflair_core.attacks.adversary_host FOLDER``.

Like the worker of attacks it holds what is granted, and no truth; what crosses reaches it through its pipes, frame by
frame: a request and its honest reply go in, the reply that the data party gets comes out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

import torch
from safetensors.torch import load, save
from torch import Tensor

from vflair_core.attacks.adversary import Adversary, Tampered, honestly
from vflair_core.attacks.attack import Launch, call
from vflair_core.attacks.evidence import Evidence, furnish, needed, save_evidence
from vflair_core.attacks.isolation import attack_device
from vflair_core.attacks.worker import Granted, Room
from vflair_core.auxiliary import auxiliary_of
from vflair_core.communication.channel import Transcript
from vflair_core.communication.codec import decode, encode
from vflair_core.communication.message import Message
from vflair_core.errors import AttackError
from vflair_core.plugins import load_target
from vflair_core.processes import environment
from vflair_core.victims import Crossed

if TYPE_CHECKING:
    from vflair_core.experiments.context import Setting
    from vflair_core.parties.data_party.party import DataParty
    from vflair_core.parties.model_party.party import ModelParty


@contextmanager
def acting(
    opening: Launch | None, party: DataParty, model_party: ModelParty, setting: Setting
) -> Iterator[Callable[[], dict[str, Tensor]]]:
    """Put the adversary of `opening`, if there is one, in the model party's place; yield what tells its state.

    Raises:
        AttackError: It asks for more than it is granted, fails, or answers what is no answer.
    """
    if opening is None:
        yield dict
        return
    e = setting.experiment
    evidence = Evidence(
        party=party,
        model_party=model_party,
        pretrained=setting.pretrained,
        main=Crossed(Transcript(), [], []),
        bypassed=None,
        releases=1,
        task_kind=setting.task.kind,
        victims={"main": 0},
        seed=e.seed,
        auxiliary=auxiliary_of(setting.task, e.victims, e.seed),
    )
    with tempfile.TemporaryDirectory(prefix="vflair-") as name:
        store, folder = Path(name, "store"), Path(name, "granted")
        folder.mkdir()
        save_evidence(store, evidence, needed([opening]))
        threads = e.threads or torch.get_num_threads()
        furnish(folder, store, [opening], threads, attack_device(e.attack_device))
        with (_Inline if e.isolation == "inline" else _Process)(folder) as host:
            channel = Tampered(party.line.channel, host.tamper)
            party.channel = party.line.channel = channel
            try:
                yield host.state
            finally:
                # What a defense measures of itself afterwards crosses as it should.
                channel.tamper = honestly


def _build(folder: Path) -> Adversary:
    """Make the adversary that the job in a folder describes, with what is granted there."""
    room = Room(folder)
    (spec,) = room.job["attacks"]
    attack: Any = load_target(spec["target"])(**spec["options"])
    torch.manual_seed(spec["seed"])
    adversary = call(attack.adversary, Granted(room, spec, "main", lambda *_: None))
    if not isinstance(adversary, Adversary):
        raise AttackError(
            f"{spec['target']}.adversary returned a {type(adversary).__name__}, not an Adversary."
        )
    return adversary


def _kept(adversary: Adversary) -> dict[str, Tensor]:
    """Its state, on the CPU wherever it computes."""
    return {name: value.cpu().contiguous() for name, value in adversary.state().items()}


class _Inline:
    """The adversary in this process: for notebooks and objects that cannot be imported."""

    def __init__(self, folder: Path) -> None:
        with torch.random.fork_rng():
            self.adversary = _build(folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def state(self) -> dict[str, Tensor]:
        return _kept(self.adversary)

    def tamper(self, request: Message, reply: Message) -> Message:
        with torch.random.fork_rng(), torch.enable_grad():
            return self.adversary.tamper(request, reply)


class _Process:
    """The adversary in a process that holds its folder and sees the messages."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> Self:
        self.errors = (self.folder / "stderr.txt").open("w")
        self.process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", "vflair_core.attacks.adversary_host", str(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            cwd=self.folder,
            env=environment(),
        )
        return self

    def __exit__(self, *_: object) -> None:
        with self.process:  # closes its pipes, at which it ends, and waits for it
            self.errors.close()

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
            raise AttackError(self._why())
        return answer

    def _why(self) -> str:
        code, report = self.process.wait(), self.folder / "error.json"
        if report.exists():
            facts = json.loads(report.read_text())
            return f"The adversary failed: {facts['error']}\n{facts['traceback']}"
        said = (self.folder / "stderr.txt").read_text()[-2000:]
        return f"The process of the adversary ended with code {code}: {said}"


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


def main(folder: str) -> int:
    """Entry point of the process."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a plugin prints must not end up among the frames
    place = Path(folder)
    torch.set_num_threads(json.loads((place / "job.json").read_text())["threads"])
    try:
        _serve(_build(place), sys.stdin.buffer, replies)
    except Exception as error:  # noqa: BLE001 - the parent raises it by name
        report = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        (place / "error.json").write_text(json.dumps(report))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
