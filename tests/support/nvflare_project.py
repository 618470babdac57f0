"""A project of NVFlare on this machine: provisioned, with certificates, its server and sites each a process."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

from vflair_nvflare.allow import allow

SUPPORT = Path(__file__).parent
SITES = ("model", "alice", "bob")


class Project:
    """Provisioned in a folder; ``with`` starts the server, whose processes record what they receive, and the sites."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.records = folder, folder / "records"
        self.records.mkdir()
        (folder / "home").mkdir()
        self.environment = {
            **os.environ,
            "HOME": str(folder / "home"),
            "NVFLARE_POC_WORKSPACE": str(folder / "poc"),
            "PYTHONWARNINGS": "ignore",
        }
        self._provision()

    def _provision(self) -> None:
        nvflare = [sys.executable, "-m", "nvflare.cli", "poc", "prepare"]
        command = [*nvflare, "-c", *SITES, "--force"]
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        (server,) = self.folder.glob("poc/*/prod_00/server")
        self.kits = server.parent
        with socket.create_server(("127.0.0.1", 0)) as listening:
            port = listening.getsockname()[1]
        for file in self.kits.glob("*/startup/fed_*.json"):
            text = file.read_text().replace("8002", str(port)).replace("server:", "localhost:")
            file.write_text(text)  # on loopback only
        for site in ("server", *SITES):
            allow(self.kits / site)
        resources = self.kits / "server" / "local" / "resources.json"
        text = resources.read_text()  # ten minutes without a sign of life are too long for a test
        assert '"heart_beat_timeout": 600' in text
        resources.write_text(text.replace('"heart_beat_timeout": 600', '"heart_beat_timeout": 20'))

    def __enter__(self):
        self.processes = {name: self._start(name) for name in ("server", *SITES)}
        try:
            self._administer("wait", len(SITES))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _start(self, name):
        kind = "server" if name == "server" else "client"
        path = [os.environ.get("PYTHONPATH", ""), str(SUPPORT)]
        environment = dict(self.environment)
        if kind == "server":
            environment["VFLAIR_RECORD"] = str(self.records)
            path.insert(0, str(SUPPORT / "nvflare_recorder"))
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        command = [sys.executable, "-m", f"nvflare.private.fed.app.{kind}.{kind}_train"]
        command += ["-m", str(self.kits / name), "-s", f"fed_{kind}.json", "--set"]
        command += ["secure_train=true", "org=nvidia", "config_folder=config"]
        if kind == "client":
            command.append(f"uid={name}")
        with (self.folder / f"{name}.out").open("w") as out:
            return subprocess.Popen(
                command, cwd=self.kits / name, env=environment, stdout=out, stderr=out
            )

    def kill(self, site, job_process):
        """End a site as a whole: its process, and the one of the job."""
        self.processes[site].kill()
        self.processes[site].wait()
        os.kill(job_process, signal.SIGKILL)

    def start_again(self, site):
        self.processes[site] = self._start(site)
        self._administer("wait", len(SITES))

    def run(self, job, seconds=300):
        """Run a job to its end; its status, its result at the server, and its folder at each site."""
        for file in self.records.iterdir():
            file.write_bytes(b"")  # of this job only
        job.export_job(str(self.folder / "jobs"))
        said = self._administer("run", self.folder / "jobs" / job.name, seconds)
        done = json.loads(said.splitlines()[-1])
        found = list(Path(done["result"]).rglob("vflair.json"))
        result = json.loads(found[0].read_text()) if found else None
        folders = {site: self.kits / site / done["number"] / "vflair" for site in SITES}
        return done["status"], result, folders

    def _administer(self, *arguments):
        kit = self.kits / "admin@nvidia.com"
        command = [sys.executable, str(SUPPORT / "nvflare_admin.py"), str(kit)]
        done = subprocess.run(
            [*command, *map(str, arguments)],
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def received(self):
        """All that the server's processes received since the last job began."""
        return b"".join(file.read_bytes() for file in self.records.iterdir())

    def kept(self):
        """All that lies at the server: its workspace, its stores of jobs and snapshots, and what archives there hold."""
        places = [
            self.kits / "server",
            *self.folder.glob("poc/*-storage"),
            self.folder / "server.out",
        ]
        return b"\n".join(content for place in places for content in contents(place))


def contents(place):
    """The content of every file below `place`, and of every file in an archive."""
    for file in [place] if place.is_file() else place.rglob("*"):
        if file.is_file():
            data = file.read_bytes()
            yield data
            if zipfile.is_zipfile(io.BytesIO(data)):
                with zipfile.ZipFile(io.BytesIO(data)) as archive:
                    yield from (archive.read(name) for name in archive.namelist())
