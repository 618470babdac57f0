"""What is checked before a commit is what nox checks."""

from __future__ import annotations

import ast
import os
import shlex

import yaml

from support.paths import ROOT

PLUGINS = [f"plugins/vflair-{name}" for name in ("attacks", "defenses", "tasks", "nvflare")]
ELSEWHERE = ["plugins/vflair-flower"]  # its session checks its types: flwr fits in no other


def hooks() -> list[list[str]]:
    """The words of each command that pre-commit runs."""
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    return [shlex.split(hook["entry"]) for repo in config["repos"] for hook in repo["hooks"]]


def commands(*names: str) -> list[list[str]]:
    """The words of each command that functions of noxfile.py run, as far as they spell them out."""
    tree = ast.parse((ROOT / "noxfile.py").read_text())
    functions = [f for f in tree.body if isinstance(f, ast.FunctionDef) and f.name in names]
    calls = [c for f in functions for c in ast.walk(f) if isinstance(c, ast.Call)]
    runs = [c.args for c in calls if ast.unparse(c.func) == "session.run"]
    return [[word.value for word in args if isinstance(word, ast.Constant)] for args in runs]


def test_pre_commit_runs_the_commands_of_lint_and_types_and_no_others():
    found = [words[2:] if words[0] == "env" else words for words in hooks()]
    wanted = commands("lint", "check_types")
    assert len(found) == len(wanted) == 4
    for words in wanted:
        assert [hook for hook in found if hook[: len(words)] == words], words


def test_pre_commit_checks_the_types_of_every_package():
    (mypy,) = [words for words in hooks() if words[0] == "mypy"]
    packages = [f"{folder}/{folder.rpartition('/')[2].replace('-', '_')}" for folder in PLUGINS]
    assert mypy[1:] == ["vflair_core", *packages]


def test_pre_commit_lets_lint_imports_see_every_package():
    (path,) = [words[1] for words in hooks() if words[0] == "env"]
    assert path == "PYTHONPATH=" + os.pathsep.join([".", *PLUGINS, *ELSEWHERE])
