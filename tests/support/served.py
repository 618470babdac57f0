"""`vflair serve` as an operator starts it: a process of its own with certificates, tokens and a tiny model, for tests."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import attrs

from vflair_core.communication.remote.certificates import init_authority
from vflair_core.communication.remote.clients import entry_for, new_token
from vflair_core.testing import tiny_model

EVERYTHING = ("infer", "train", "save", "resume")


@attrs.define
class Premises:
    """A folder with all that both parties need: a checkpoint, certificates, tokens."""

    folder: Path
    tokens: dict[str, str] = attrs.field(factory=dict)

    @classmethod
    def made(cls, folder: Path, rights: dict[str, tuple[str, ...]]) -> Premises:
        """Make them for clients with these rights."""
        premises = cls(folder)
        tiny_model("llama").save_pretrained(folder / "model")
        init_authority(folder / "tls", clients=list(rights))
        premises.tokens = {name: new_token() for name in rights}
        premises.write_clients(
            *(entry_for(name, premises.tokens[name], may) for name, may in rights.items())
        )
        return premises

    def write_clients(self, *lines: str) -> None:
        """Write the file of clients, as an editor does: aside, then renamed."""
        aside = self.folder / "aside"
        aside.touch(0o600)
        aside.write_text("\n".join(lines))
        aside.replace(self.folder / "clients.toml")

    def files(self, client: str) -> dict[str, Path]:
        """What a client connects with."""
        home = self.folder / "tls" / "clients" / client
        return {
            "ca": home / "ca.pem",
            "certificate": home / "client.pem",
            "key": home / "client-key.pem",
        }

    def options(self, client: str) -> dict[str, object]:
        """What a client gives to `connect`."""
        return {**self.files(client), "token": self.tokens[client]}

    def words(self, listen: str = "127.0.0.1:0") -> list[str]:
        """What `vflair serve` is given."""
        home = self.folder / "tls" / "model-party"
        return [
            *("serve", "--model", str(self.folder / "model"), "--partition", "1,1"),
            *("--listen", listen, "--device", "cpu"),
            *("--tls-cert", str(home / "server.pem"), "--tls-key", str(home / "server-key.pem")),
            *("--client-ca", str(home / "ca.pem"), "--tokens", str(self.folder / "clients.toml")),
        ]


@attrs.define
class Served:
    """A model party that serves."""

    process: subprocess.Popen[str]
    said: str  # its line when it was ready
    log: list[dict[str, object]]  # what it logged so far
    _new: threading.Condition

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(re.search(r"127\.0\.0\.1:(\d+)", self.said)[1])

    @property
    def url(self) -> str:
        """How it is reached."""
        return f"grpc://127.0.0.1:{self.port}"

    def logged(self, event: str, seconds: float = 60) -> dict[str, object]:
        """Wait until it logged `event`."""

        def found() -> dict[str, object] | None:
            return next((line for line in self.log if line["event"] == event), None)

        with self._new:
            assert self._new.wait_for(found, seconds), f"no {event} in {self.log}"
            return found()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, and return how it ended."""
        self.process.send_signal(number)
        return self.process.wait(60)


@contextlib.contextmanager
def served(words: list[str]):
    """Run `vflair` with these words, and wait until it says that it serves."""
    command = [sys.executable, "-m", "vflair_core.cli.main", *words, "--logs", "json"]
    log, new = [], threading.Condition()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:

        def follow() -> None:
            for line in process.stderr:
                with new:
                    log.append(json.loads(line) if line[:1] == "{" else {"event": line})
                    new.notify_all()

        follower = threading.Thread(target=follow, daemon=True)
        follower.start()
        try:
            said = process.stdout.readline()
            assert said.startswith("serving"), log
            yield Served(process, said, log, new)
        finally:
            process.kill()
            process.wait(60)
            follower.join(60)
