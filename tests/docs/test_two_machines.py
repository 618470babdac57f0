"""The page about two machines, done as a new user would: its commands and its Python, on loopback, with a folder for each machine."""

from __future__ import annotations

import configparser
import contextlib
import functools
import json
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("grpc")
pytest.importorskip("cryptography")
pytest.importorskip("prometheus_client")

from support.paths import DOCS
from support.real_model import MISSING
from vflair_core.cli.main import app

PAGE = (DOCS / "two-machines.md").read_text()
MACHINES = {
    "operator's machine": "operator",
    "machine of the model party": "models",
    "alice's machine": "alice",
}
# Programs of a shell that the page uses: vflair itself, and a copy to another machine.
PRELUDE = f"""
set -eu
vflair() {{ {shlex.quote(sys.executable)} -m vflair_core.cli.main "$@"; }}
scp() {{ cp -r "$2" "../${{3%%.*}}"; }}
"""


def blocks(*languages: str) -> list[tuple[str, str, str]]:
    """Language, machine and text of each block."""
    found = []
    for language, text in re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE):
        if language in languages:
            first = text.split("\n", 1)[0].removeprefix("# on ").removeprefix("the ")
            found.append((language, MACHINES[first], text))
    return found


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def here(text: str, port: int) -> str:
    """The same on this machine alone."""
    text = text.replace("0.0.0.0:8443", f"127.0.0.1:{port}").replace("9464", "0")
    text = re.sub(r"models\.example\.org(?!:\n)", "localhost", text)
    return text.replace("localhost:8443", f"localhost:{port}")


def run(command: list[str], folder: Path) -> None:
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr


@contextlib.contextmanager
def serving(text: str, folder: Path, port: int):
    """Start what the page starts, and wait until it says that it is ready."""
    words = shlex.split(here(text, port).replace("\\\n", ""), comments=True)
    command = [sys.executable, "-m", "vflair_core.cli.main", *words[1:]]
    with (
        (folder / "log").open("a") as log,
        subprocess.Popen(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=log, text=True
        ) as process,
    ):
        try:
            said = process.stdout.readline()
            assert said.startswith("serving"), (folder / "log").read_text()
            yield process
        finally:
            process.kill()


@pytest.fixture
def machines(tmp_path):
    """A folder for each machine."""
    for name in MACHINES.values():
        (tmp_path / name).mkdir()
    return tmp_path


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
def test_the_page_works_as_it_is_written_also_when_the_model_party_is_killed(machines):
    port = free_port()
    shell, python = blocks("sh"), [here(text, port) for _, _, text in blocks("py")]
    waits = "print('half', flush=True)\ninput()\n"
    resumes = next(n for n, text in enumerate(python) if "tuning.load" in text)
    page = [*python[:resumes], waits, *python[resumes:]]
    (machines / "alice" / "page.py").write_text("\n".join(page))
    with contextlib.ExitStack() as stack:
        for _, machine, text in shell:
            if "--listen" in text:
                start = functools.partial(serving, text, machines / machine, port)
                first = stack.enter_context(start())
            else:
                run(["bash", "-c", PRELUDE + here(text, port)], machines / machine)
        client = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "page.py"],
                cwd=machines / "alice",
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        stack.callback(client.kill)
        assert "Paris" in client.stdout.readline()
        assert client.stdout.readline() == "half\n"
        first.kill()
        first.wait(60)
        second = stack.enter_context(start())
        client.communicate("\n", timeout=600)
        assert client.returncode == 0
        second.send_signal(signal.SIGTERM)
        assert second.wait(120) == 0
    text = (machines / "models" / "audit.jsonl").read_text()
    audit = [json.loads(line) for line in text.splitlines()]
    assert {"open", "forward", "backward", "commit", "save"} <= {line["kind"] for line in audit}
    assert {line["refused"] for line in audit} == {None}


def test_the_unit_and_the_container_start_what_there_is():
    (unit,) = re.findall(r"^```ini\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    parsed = configparser.ConfigParser(interpolation=None)
    parsed.read_string(unit)
    words = shlex.split(parsed["Service"]["ExecStart"])
    app.parse_args(words[1:], print_error=False, exit_on_error=False)
    (container,) = re.findall(r"^```dockerfile\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    entry = json.loads(re.search(r"ENTRYPOINT (.*)", container)[1])
    app.parse_args(entry[1:], print_error=False, exit_on_error=False)


def test_every_metric_of_the_page_is_one_and_every_one_is_on_the_page():
    from vflair_core.communication.remote.metrics import HELD, Metrics

    named = {re.sub(r"\{.*", "", name) for name in re.findall(r"`(vflair_[\w{},]+)`", PAGE)}
    ours = {f"vflair_{name}" for name in HELD}
    for family in Metrics({}).registry.collect():
        if family.type in ("counter", "histogram"):
            ours.add(family.name + ("_total" if family.type == "counter" else ""))
    assert named == ours
