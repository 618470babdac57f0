"""Use our wheels where nothing else of ours is: ``python -P fresh_install.py STAGE DIST README``, by nox -s packages.

STAGE is what was installed there: ``core``, ``plugin`` (the core and vflair-defenses) or ``everything`` (vflair). DIST holds
the wheels, README is the repository's. Needs nothing but what is installed; what goes wrong is an exception.
"""

from __future__ import annotations

import importlib.metadata
import re
import resource
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

OURS = ("vflair", "vflair-attacks", "vflair-core", "vflair-defenses", "vflair-tasks")
SCRIPTS = Path(sys.executable).parent


def main(stage: str, dist: Path, readme: Path) -> None:
    check_installed(dist)
    {"core": use_core, "plugin": use_plugin, "everything": lambda: use_everything(readme)}[stage]()
    sys.stdout.write(f"{stage}: ok\n")


def check_installed(dist: Path) -> None:
    """What is installed of ours is what was built, file by file, and was not found somewhere else."""
    for name in installed(*OURS):
        (wheel,) = dist.glob(f"{name.replace('-', '_')}-[0-9]*.whl")
        there = importlib.metadata.distribution(name)
        with zipfile.ZipFile(wheel) as built:
            for file in built.namelist():
                if not file.endswith("/RECORD"):  # the installer adds what it wrote
                    assert Path(there.locate_file(file)).read_bytes() == built.read(file), file


def installed(*names: str) -> list[str]:
    found = {d.metadata["Name"] for d in importlib.metadata.distributions()}
    return [name for name in names if name in found]


# -- stages ----------------------------------------------------------------------------------------------


def use_core() -> None:
    """The core embedded in a program: split a model without peft, without a program, which says what it lacks."""
    assert installed(*OURS, "peft", "cyclopts", "accelerate") == ["vflair-core"]
    run_readme("vflair-core", python_only=True)
    program = subprocess.run(
        [SCRIPTS / "vflair", "plugins"], capture_output=True, text=True, check=False
    )
    assert program.returncode == 1
    assert program.stderr.endswith("python -m pip install 'vflair-core[cli]'.\n"), program.stderr
    assert program.stderr.count("\n") == 1, program.stderr
    cost = min(seconds_of("import vflair_core") - seconds_of("") for _ in range(5))
    sys.stdout.write(
        f"import vflair_core: {1000 * cost:.0f} ms of a processor, the least of five\n"
    )


def seconds_of(code: str) -> float:
    """Seconds of a processor that a process with this code takes: what else the machine does is not counted."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def use_plugin() -> None:
    """A defended split, the guarantee of which has a number."""
    import torch

    from vflair_core import Partition, split
    from vflair_core.testing import tiny_batch, tiny_model
    from vflair_defenses.gaussian_noise import GaussianNoise

    model = tiny_model("llama")
    batch = tiny_batch(model, labels="tokens")
    plain = model(**batch).loss
    noise = GaussianNoise(noise_multiplier=0.3, clip=1.0)
    data_party, _ = split(model, Partition(head=1, tail=1), defenses=[noise], seed=0)
    loss = data_party.model(**batch).loss
    assert torch.isfinite(loss)
    assert not loss.equal(plain)
    assert noise.guarantee(releases=1).epsilon > 0


def use_everything(readme: Path) -> None:
    """The program, adapters, and what each page that comes with a wheel shows."""
    assert installed(*OURS) == list(OURS)
    listed = subprocess.run(
        [SCRIPTS / "vflair", "plugins"], capture_output=True, text=True, check=True
    )
    for plugin in ("attacks", "defenses", "tasks"):
        assert re.search(rf"\b{plugin}\b", listed.stdout), listed.stdout
    from vflair_core import Lora, Partition, split, tune
    from vflair_core.testing import tiny_model

    data_party, _ = split(tiny_model("llama"), Partition(head=1, tail=1))
    names = tune(data_party, ["head"], adapters=Lora(r=2))
    assert names
    assert all("lora" in name for name in names)
    for name in OURS:
        run_readme(name)
    run_blocks(readme.read_text(), python_only=True)  # its commands are those of a checkout


# -- pages -----------------------------------------------------------------------------------------------


def run_readme(name: str, *, python_only: bool = False) -> None:
    """Run what the long description of a distribution shows, as it was installed."""
    sys.stdout.write(f"{name}: what its page shows\n")
    sys.stdout.flush()
    run_blocks(str(importlib.metadata.metadata(name).get_payload()), python_only=python_only)


def run_blocks(page: str, *, python_only: bool) -> None:
    """Run the blocks of a page from top to bottom in an empty folder; one that begins with a name is that file."""
    with tempfile.TemporaryDirectory() as folder:
        for language, text in blocks(page):
            named = re.match(r"# ([\w-]+\.\w+)\n", text)
            if named:
                Path(folder, named[1]).write_text(text)
            elif language == "python":
                subprocess.run([sys.executable, "-c", text], cwd=folder, check=True)
            elif language == "bash" and not python_only:
                script = f'PATH="{SCRIPTS}:$PATH"\n{text}'
                subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=folder, check=True)


def blocks(page: str) -> Iterator[tuple[str, str]]:
    for match in re.finditer(r"^```(\w+)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE):
        yield match[1], match[2]


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
