"""Every command of docs/first-plugin.md is run, in order, in an environment of its own; but for the upload."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig

import pytest

from support.paths import DOCS

PAGE = (DOCS / "first-plugin.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line]
OFFLINE = {  # an index is asked for nothing: what is needed is installed
    "PIP_NO_INDEX": "1",
    "PIP_NO_BUILD_ISOLATION": "0",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
}


@pytest.fixture
def environment(tmp_path):
    """A virtual environment that sees the packages of this one; what is installed there stays there."""
    venv = tmp_path / "venv"
    command = [sys.executable, "-m", "venv", "--without-pip", venv]
    subprocess.run(command, check=True, timeout=300)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    seen = [path for path in sys.path if path.endswith("site-packages")]
    seen.append(sysconfig.get_path("purelib"))
    lines = [f"import site; site.addsitedir({path!r})" for path in dict.fromkeys(seen)]
    (venv / "lib" / version / "site-packages" / "seen.pth").write_text("\n".join(lines) + "\n")
    paths = [str(venv / "bin"), os.environ["PATH"]]
    return os.environ | OFFLINE | {"PATH": os.pathsep.join(paths), "VIRTUAL_ENV": str(venv)}


def adapted(command: str) -> str:
    """The command as it runs without a network, with scripts of this environment run by the other one."""
    if command == "python -m build":
        return "python -m build --no-isolation"
    name, _, rest = command.partition(" ")
    modules = {"vflair": "vflair_core.cli.main", "pytest": "pytest", "twine": "twine", "pip": "pip"}
    return f"python -m {modules[name]} {rest}" if name in modules else command


@pytest.mark.slow
def test_each_command_of_the_page_works(environment, tmp_path):
    pytest.importorskip("vflair_attacks")
    place, said = tmp_path, {}
    for command in COMMANDS:
        if command.startswith("twine upload"):
            continue
        if command.startswith("cd "):
            place = place / command.removeprefix("cd ")
            continue
        done = subprocess.run(
            adapted(command), shell=True, cwd=place, env=environment, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900,
        )  # fmt: skip
        said[command] = done.stdout
        assert done.returncode == 0, f"{command}\n{done.stdout}"
    assert "word-shuffle" in said["vflair plugins"]
    report = (place / "report.html").read_text()
    for name in ("word-shuffle-attack", "word-shuffle-defense", "word-shuffle-task"):
        assert name in report
    built = sorted(path.suffix for path in (place / "dist").iterdir())
    assert built == [".gz", ".whl"]
    assert [command for command in COMMANDS if command not in said] == [
        "cd vflair-word-shuffle",
        "twine upload dist/*",
    ]
