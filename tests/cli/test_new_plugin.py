"""`vflair new-plugin` makes a package whose own tests pass, whatever it was asked to begin with."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib

import attrs
import pytest

from vflair_core import plugin_manager, read_experiment, read_grid
from vflair_core.cli.main import main
from vflair_core.offers import find, offers

PARTS = ("attack", "defense", "task")


def made(folder, name, *options):
    with pytest.raises(SystemExit) as ended:
        main(["new-plugin", name, "--out", str(folder), *options])
    assert not ended.value.code
    return folder


@pytest.fixture
def installed(monkeypatch):
    """Put a package on the path as pip would; return what a process needs to find it."""

    def put(folder):
        project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
        info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
        )
        lines = [f"{key} = {value}" for key, value in project["entry-points"]["vflair"].items()]
        (info / "entry_points.txt").write_text("\n".join(["[vflair]", *lines, ""]))
        monkeypatch.syspath_prepend(str(folder))
        return os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, sys.path)])}

    return put


@pytest.mark.parametrize("part", PARTS)
def test_one_part_alone_meets_what_our_packages_offer(part, tmp_path, installed):
    """What the three do together is run by tests/docs/test_first_plugin.py."""
    pytest.importorskip("vflair_attacks")
    name = f"made-{part}"
    folder = made(tmp_path / "made", name, f"--{part}")
    installed(folder)
    tests = {path.name for path in (folder / "tests").iterdir()}
    assert tests == {"test_experiment.py", f"test_{part}.py"}
    manager = plugin_manager()
    (info,) = [info for info in manager.about() if info.name == name]
    assert info.error is None
    assert info.hooks == (f"vflair_{part}s",)
    assert offers(manager, f"{part}s")[f"{name}-{part}"].source == f"vflair-{name}"
    experiment = read_experiment(folder / "experiment.toml")
    for each in PARTS:
        named = experiment.task if each == "task" else getattr(experiment, f"{each}s")[0]
        offered = find(manager, f"{each}s", named.name)
        assert (offered.source == f"vflair-{name}") == (each == part)
    (cell, *_) = read_grid(folder / "study.toml")
    assert attrs.evolve(cell.experiment, seed=experiment.seed) == experiment
    needs = tomllib.loads((folder / "pyproject.toml").read_text())["project"]["dependencies"]
    others = {f"vflair-{other}s>=0.1" for other in PARTS if other != part}
    assert set(needs) == {"vflair-core>=0.1", *others}


def test_what_is_begun_is_short():
    from vflair_core.cli.new_plugin import TEMPLATE

    for part in PARTS:
        code = (TEMPLATE / f"{part}.py.txt").read_text().split('"""', 2)[2]
        lines = [line for line in code.splitlines() if line.strip()]
        assert len(lines) <= 35, part


def test_a_package_imports_nothing_heavy_until_it_is_used(tmp_path, installed):
    environment = installed(made(tmp_path / "made", "light"))
    code = "import sys, vflair_light\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=60)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Word Shuffle", "use small letters, digits and single hyphens"),
        ("1st", "use small letters"),
        ("a--b", "use small letters"),
        ("../escape", "use small letters"),
        ("class", "use small letters"),
        ("attacks", "a plugin called 'attacks' already"),
        ("vflair-core", "a plugin called 'core' already"),
    ],
)
def test_a_name_that_cannot_be_is_refused_and_nothing_is_written(name, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["new-plugin", name, "--out", str(tmp_path / "made")])
    assert ended.value.code == 1
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_stays_as_it_is(tmp_path, capsys):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit) as ended:
        main(["new-plugin", "mine", "--out", str(tmp_path / "made")])
    assert ended.value.code == 1
    assert "is there already" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["mine.txt"]
