"""The distributions of this repository: what they declare, and what is built of them."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import Any

from attrs import frozen

from support.paths import ROOT


@frozen
class Distribution:
    """One folder with a pyproject.toml."""

    folder: Path

    @property
    def project(self) -> dict[str, Any]:
        """Its table `project`."""
        return tomllib.loads((self.folder / "pyproject.toml").read_text())["project"]

    @property
    def name(self) -> str:
        return self.project["name"]

    @property
    def package(self) -> Path | None:
        """The folder of its modules; None if it has none, as the one that only installs others."""
        folder = self.folder / self.name.replace("-", "_")
        return folder if folder.is_dir() else None

    @property
    def extras(self) -> dict[str, list[str]]:
        return self.project.get("optional-dependencies", {})


DISTRIBUTIONS = [
    Distribution(path.parent)
    for path in (ROOT / "pyproject.toml", *sorted(ROOT.glob("plugins/*/pyproject.toml")))
]


def build(folder: Path, into: Path, target: str, *, umask: int = 0o022) -> Path:
    """Build the `wheel` or the `sdist` of a folder, and return its file."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(into)]
    environment = {**os.environ, "SOURCE_DATE_EPOCH": "1700000000", "PYTHONWARNINGS": "ignore"}
    before = set(into.glob("*"))
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        umask=umask,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (file,) = set(into.glob("*")) - before
    return file


def files_of(archive: Path) -> dict[str, bytes]:
    """What lies in a wheel or a source distribution; of the latter, below its one folder."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return {name: wheel.read(name) for name in wheel.namelist()}
    with tarfile.open(archive) as source:
        members = {m.name.partition("/")[2]: source.extractfile(m) for m in source if m.isfile()}
        return {name: file.read() for name, file in members.items() if file is not None}


def metadata_of(wheel: Path) -> Message:
    """The metadata of a wheel; its payload is the long description."""
    (text,) = [
        text for name, text in files_of(wheel).items() if name.endswith(".dist-info/METADATA")
    ]
    return Parser().parsestr(text.decode())
