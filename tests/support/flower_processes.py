"""Flower as an operator starts it: a SuperLink and SuperNodes of their own, on loopback, with TLS and keys, for tests.

Nothing of it needs a network, and nothing outlives the test: each process leads a group of its own, which is ended whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import attrs
import tomli_w
from cryptography.hazmat.primitives import serialization as form
from cryptography.hazmat.primitives.asymmetric import ec

from vflair_core import init_authority

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
}


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def group_of(process: subprocess.Popen) -> list[int]:
    """Processes that are left of a group."""
    left = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            words = status.read_text().rpartition(")")[2].split()
            if int(words[2]) == process.pid and words[0] != "Z":
                left.append(int(status.parent.name))
    return left


@attrs.define
class Federation:
    """A SuperLink, its SuperNodes, and the folder with all that they need and write."""

    folder: Path
    port: int = attrs.field(factory=free_port)
    processes: dict[str, subprocess.Popen] = attrs.field(factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """What each process is started in."""
        return {**os.environ, **QUIET, "FLWR_HOME": str(self.folder / "home")}

    @property
    def authority(self) -> Path:
        """The authority that signed the SuperLink's certificate."""
        return self.folder / "tls" / "model-party" / "ca.pem"

    def start(self, name: str, *words: str) -> subprocess.Popen:
        """Start a program, which leads a group of its own and writes ``NAME.log``."""
        with (self.folder / f"{name}.log").open("w") as log:
            process = subprocess.Popen(
                words,
                env=self.environment,
                cwd=self.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes[name] = process
        return process

    def log(self, name: str) -> str:
        """What a program wrote so far."""
        return (self.folder / f"{name}.log").read_text()

    def begin(self) -> None:
        """Start the SuperLink, and wait until it listens."""
        init_authority(self.folder / "tls")
        home = self.folder / "tls" / "model-party"
        (self.folder / "home").mkdir()
        here = {"address": f"127.0.0.1:{self.port}", "root-certificates": str(self.authority)}
        config = {"superlink": {"default": "here", "here": here}}
        (self.folder / "home" / "config.toml").write_text(tomli_w.dumps(config))
        self.start(
            "superlink",
            *("flower-superlink", "--host", "127.0.0.1", "--port", str(self.port)),
            *(
                "--ssl-ca-certfile",
                str(home / "ca.pem"),
                "--ssl-certfile",
                str(home / "server.pem"),
            ),
            *("--ssl-keyfile", str(home / "server-key.pem"), "--enable-supernode-auth"),
            "--disable-runtime-dependency-installation",
        )
        self.wait(self._listens, "the SuperLink does not listen")

    def _listens(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        except OSError:
            return False
        return True

    def wait(self, done, why: str, seconds: float = 180) -> None:
        """Wait until something is so, or say what did not come, with all logs."""
        until = time.monotonic() + seconds
        while not done():
            if time.monotonic() > until:
                logs = "\n".join(f"-- {name}\n{self.log(name)[-4000:]}" for name in self.processes)
                raise AssertionError(f"{why}\n{logs}")
            time.sleep(0.1)

    def flwr(self, *words: str) -> dict:
        """Run `flwr`, and return what it says as JSON."""
        done = subprocess.run(
            ["flwr", *words, "--format", "json"],
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout[done.stdout.index("{") :])

    def key(self, name: str) -> Path:
        """Make the key of a node; the public one lies beside it."""
        key = ec.generate_private_key(ec.SECP384R1())
        private, public = self.folder / f"{name}.key", self.folder / f"{name}.pub"
        private.write_bytes(
            key.private_bytes(form.Encoding.PEM, form.PrivateFormat.OpenSSH, form.NoEncryption())
        )
        private.chmod(0o600)
        public.write_bytes(
            key.public_key().public_bytes(form.Encoding.OpenSSH, form.PublicFormat.OpenSSH)
        )
        return private

    def node(self, name: str, *, register: bool = True, **config: object) -> subprocess.Popen:
        """Start a SuperNode with a key of its own, and tell the SuperLink of it."""
        key = self.key(name)
        if register:
            self.flwr("supernode", "register", f"{name}.pub", "here", "--name", name)
        said = " ".join(f"{k.replace('_', '-')}={json.dumps(value)}" for k, value in config.items())
        return self.start(
            name,
            *("flower-supernode", "--superlink", f"127.0.0.1:{self.port}"),
            *("--root-certificates", str(self.authority)),
            *("--auth-supernode-private-key", str(key), "--node-config", said),
            *("--host", "127.0.0.1", "--port", str(free_port())),
        )

    def run(self, **config: object) -> str:
        """Start a run of our apps with this run config, and return its number."""
        app = self.folder / "app"
        app.mkdir(exist_ok=True)
        apps = {
            "serverapp": "vflair_flower.model_party_app:app",
            "clientapp": "vflair_flower.data_party_app:app",
        }
        said = {k.replace("_", "-"): value for k, value in config.items()}
        facts = {
            "name": "trial",
            "version": "0.1.0",
            "description": "A trial.",
            "license": "Apache-2.0",
        }
        tool = {"flwr": {"app": {"publisher": "vflair", "components": apps, "config": said}}}
        (app / "pyproject.toml").write_text(tomli_w.dumps({"project": facts, "tool": tool}))
        return self.flwr("run", "app", "here")["run-id"]

    def status(self, run: str) -> str:
        """How a run stands."""
        (facts,) = self.flwr("ls", "here", "--run-id", run)["runs"]
        return facts["status"]

    def finished(self, run: str, seconds: float = 300) -> str:
        """Wait until a run is over, and return how it ended."""

        def over() -> bool:  # asking `flwr ls` again and again would take most of the processor
            lines = self.log("superlink").splitlines()
            return any("Finished task" in line and run in line for line in lines)

        self.wait(over, f"run {run} does not end", seconds)
        return self.status(run)

    def end(self, name: str, number: int = signal.SIGTERM, seconds: float = 15) -> None:
        """Send a signal to one program, then end what is left of its group, children that outlived it among them."""
        process = self.processes[name]
        if process.poll() is None:
            process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(60)
        self.wait(lambda: not group_of(process), f"children of {name} are left", 30)

    def alive(self) -> list[int]:
        """All processes that were started in this federation, by whomever: Flower detaches the SuperLink's SuperExec."""
        home, found = f"FLWR_HOME={self.folder / 'home'}".encode(), []
        for status in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if home in (status / "environ").read_bytes().split(b"\0"):
                    found.append(int(status.name))
        return found

    def close(self) -> None:
        """End all, the SuperLink last, and see that what Flower started ends with them."""
        for name in reversed(self.processes):
            self.end(name)
        try:
            self.wait(lambda: not self.alive(), "processes of Flower's are left", 30)
        finally:
            for pid in self.alive():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def federation(folder: Path):
    """Run a SuperLink in `folder` while this lasts, and whatever else is started."""
    made = Federation(folder)
    try:
        made.begin()
        yield made
    finally:
        made.close()
