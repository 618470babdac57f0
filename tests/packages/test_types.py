"""Who writes a program on vflair has its types checked: the wheels say that they are typed, and their types are right."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from support.distributions import DISTRIBUTIONS, build

TYPED = [
    d
    for d in DISTRIBUTIONS
    if d.name in {f"vflair-{n}" for n in ("attacks", "core", "defenses", "tasks")}
]
CONFIG = """
[mypy]
strict = True
[mypy-torch.*,transformers.*,numpy.*,safetensors.*,msgpack.*,sklearn.*,structlog.*]
follow_imports = skip
ignore_missing_imports = True
"""
PROGRAM = """
from vflair_attacks.norm_scoring import NormScoring
from vflair_core import Defense, Guess, Partition
from vflair_defenses.gaussian_noise import GaussianNoise
from vflair_tasks.squad import squad

Partition(head=1, tail=1)
noise: Defense = GaussianNoise(noise_multiplier=0.3)
Partition(head="one", tail=1)  # wrong
GaussianNoise(noise_multiplier="loud")  # wrong
NormScoring(wrong=1)  # wrong
squad(wrong=1)  # wrong
Guess(wrong=1)  # wrong
reveal_type(Partition(head=1, tail=1).head)  # shown
reveal_type(noise.guarantee(releases=1))  # shown
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """An environment with the files of our wheels, and beside them all that is installed here but ours."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    paths = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("purelib", "venv", vars=paths))
    for distribution in TYPED:
        (folder / distribution.name).mkdir()
        with zipfile.ZipFile(
            build(distribution.folder, folder / distribution.name, "wheel")
        ) as wheel:
            wheel.extractall(site)
    others = [path for path in sys.path if Path(path).name in {"site-packages", "dist-packages"}]
    (site / "others.pth").write_text("\n".join(others))
    return folder, site


def told_by_mypy(environment, folder):
    (folder / "program.py").write_text(PROGRAM)
    (folder / "mypy.ini").write_text(CONFIG)
    python = environment / "bin" / "python"
    options = ["--python-executable", str(python), "--cache-dir", str(environment / "cache")]
    command = [sys.executable, "-m", "mypy", *options, "program.py"]
    done = subprocess.run(
        command,
        cwd=folder,
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    return re.findall(r"^program.py:(\d+): (\w+): (.*)$", done.stdout, re.MULTILINE), done


@pytest.mark.slow
def test_mistakes_in_a_program_are_found_and_nothing_else(environment, tmp_path):
    told, done = told_by_mypy(environment[0], tmp_path)
    lines = PROGRAM.splitlines()
    found = {int(line): text for line, kind, text in told if kind == "error"}
    wrong = {number for number, line in enumerate(lines, 1) if line.endswith("# wrong")}
    assert set(found) == wrong, done.stdout + done.stderr
    shown = [text for _, _, text in told if text.startswith("Revealed")]
    assert shown == [
        'Revealed type is "int"',
        'Revealed type is "vflair_core.defenses.guarantee.Guarantee"',
    ]


@pytest.mark.slow
def test_a_wheel_that_did_not_say_so_would_be_taken_for_untyped(environment, tmp_path):
    folder, site = environment
    (site / "vflair_defenses" / "py.typed").rename(tmp_path / "py.typed")
    try:
        told, _ = told_by_mypy(folder, tmp_path)
    finally:
        (tmp_path / "py.typed").rename(site / "vflair_defenses" / "py.typed")
    assert [
        text for *_, text in told if "vflair_defenses.gaussian_noise" in text and "py.typed" in text
    ]
