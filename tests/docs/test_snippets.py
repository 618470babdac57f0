"""What the documentation shows works: Python runs, experiments parse, commands exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

from support.paths import ROOT
from vflair_core import Result
from vflair_core.cli.main import app
from vflair_core.experiments.config import experiment_from
from vflair_core.experiments.run import run
from vflair_core.experiments.studies.grid import grid_from
from vflair_core.plugins import PROJECT, plugin_manager

PAGES = [*sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*.md"))]
PAGES += [ROOT / "vflair_core" / "README.md", *sorted((ROOT / "plugins").glob("*/README.md"))]
OF_STUDY = {"experiment", "vary", "axes", "cells", "tune"}
SHORTEST = {"task": {"name": "t"}, "model": {"name": "m"}}


def blocks(page: Path, *languages: str) -> Iterator[tuple[int, str, str]]:
    """Line number, language and text of each fenced block."""
    text = page.read_text()
    for match in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        if match[1] in languages:
            yield text.count("\n", 0, match.start()) + 2, match[1], match[2]


def pages_with(*languages: str) -> list[object]:
    return [
        pytest.param(page, id=str(page.relative_to(ROOT)))
        for page in PAGES
        if any(blocks(page, *languages))
    ]


def file_named_in(text: str) -> str | None:
    """A block that begins with ``# name.py`` or ``# name.toml`` is that file."""
    named = re.match(r"# ([\w-]+\.(?:py|toml))\n", text)
    return named[1] if named else None


# peft asks transformers for something old.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("page", pages_with("python"))
def test_the_python_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    namespace = {"__name__": "page"}
    for line, language, text in blocks(page, "python", "toml"):
        file = file_named_in(text)
        if file:
            (tmp_path / file).write_text(text)
        elif language == "python":
            # Line numbers of the page, so that a traceback points into it.
            exec(compile("\n" * (line - 1) + text, str(page), "exec"), namespace)
        if file and file.startswith("test_"):
            run_pytest(tmp_path, file)


def run_pytest(folder: Path, file: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", file]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("page", pages_with("toml"))
def test_the_toml_of_a_page_is_an_experiment_a_study_a_part_of_one_or_a_project(page):
    for _, _, text in blocks(page, "toml"):
        table = tomllib.loads(text)
        if "project" in table:
            assert PROJECT in table["project"]["entry-points"]
        elif OF_STUDY & table.keys():
            grid_from(table | {"experiment": SHORTEST | table.get("experiment", {})})
        else:
            experiment_from(SHORTEST | table)


def commands(page: Path) -> list[str]:
    lines = [line for *_, text in blocks(page, "bash", "console") for line in text.splitlines()]
    return [line for line in lines if line.startswith("vflair ")]


@pytest.mark.parametrize(
    "command", sorted({command for page in PAGES for command in commands(page)})
)
def test_a_command_in_the_documentation_can_be_given(command):
    app.parse_args(shlex.split(command, comments=True)[1:], print_error=False, exit_on_error=False)


def test_a_command_that_does_not_exist_would_be_noticed():
    from cyclopts import CycloptsError

    for wrong in ("explian a.toml", "run a.toml --overide x=1"):
        with pytest.raises(CycloptsError):
            app.parse_args(wrong.split(), print_error=False, exit_on_error=False)


def test_sessions_that_the_readme_and_the_pages_name_exist():
    named = {s for page in PAGES for s in re.findall(r"nox -s ([\w-]+)", page.read_text())}
    sessions = re.findall(
        r"@nox.session.*?\ndef (\w+)", (ROOT / "noxfile.py").read_text(), re.DOTALL
    )
    assert named <= set(sessions)


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(((?!https?:)[^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> Result:
    """What a run of the page about plugins gives."""
    folder = tmp_path_factory.mktemp("run")
    for _, _, text in blocks(ROOT / "docs" / "plugins.md", "python", "toml"):
        if file := file_named_in(text):
            (folder / file).write_text(text)
    table = tomllib.loads((folder / "mine.toml").read_text())
    experiment = experiment_from({**table, "isolation": "inline", "check_unsplit": True})
    plugins = plugin_manager([folder / "mine.py"], entry_point_group="vflair.none")
    return run(experiment, plugins=plugins, out=folder / "out")


def documented(page: str) -> set[str]:
    rows = [line for line in (ROOT / "docs" / page).read_text().splitlines() if line[:1] == "|"]
    return {name for row in rows for name in re.findall(r"`([\w/.-]+)`", row)}


def test_every_field_of_a_result_is_documented(result):
    names = {field.name for field in attrs.fields(Result)} | {"numbers_hash"}
    names |= {key for arm in ("undefended", "defended") for key in result.numbers[arm]}
    assert names <= documented("experiments.md")
    text = (ROOT / "docs" / "experiments.md").read_text()
    costs = {*result.cost["defended"], *result.cost} - {"undefended", "defended"}
    scores = {*result.numbers["dcs"], *result.numbers["dcs"]["per_attack"][0]} - {"attack"}
    assert not [name for name in costs | scores if f"`{name}`" not in text]


def test_every_field_of_a_grade_is_documented(result):
    (grade,) = result.numbers["defended"]["attacks"]
    names = {*grade, *grade["floors"], *grade["details"]}
    assert names <= documented("threat-models.md")


def test_every_file_that_a_run_writes_is_documented(result, tmp_path_factory):
    out = next(tmp_path_factory.getbasetemp().glob("run*/out"))
    assert {path.name for path in out.iterdir()} <= documented("experiments.md")


def test_the_example_of_the_readme_is_short():
    (example,) = [text for *_, text in blocks(ROOT / "README.md", "python")]
    assert len([line for line in example.splitlines() if line]) <= 12
