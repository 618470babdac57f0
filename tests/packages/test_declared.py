"""What the distributions declare: one version, bounds that agree, all they import, and extras that error texts name."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import vflair_core
from support.distributions import DISTRIBUTIONS
from support.paths import ROOT

BY_NAME = {distribution.name: distribution for distribution in DISTRIBUTIONS}
META = BY_NAME["vflair"]
OF_ALL = ["vflair-attacks", "vflair-core", "vflair-defenses", "vflair-tasks"]
each = pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=lambda d: d.name)


def requirements(distribution, *, extras=True):
    """What a distribution declares, with its extras or without."""
    texts = list(distribution.project.get("dependencies", []))
    for more in distribution.extras.values() if extras else ():
        texts += more
    return [Requirement(text) for text in texts]


# -- one version -----------------------------------------------------------------------------------------


@each
def test_all_distributions_have_one_version(distribution):
    assert distribution.project["version"] == vflair_core.__version__


@each
def test_bounds_among_them_agree_with_the_version(distribution):
    """A plugin takes every release of its own minor version; what only installs others takes exactly its own."""
    version = Version(vflair_core.__version__)
    minor = f">={version.major}.{version.minor}"
    ours = [r for r in requirements(distribution) if r.name in BY_NAME]
    assert distribution.name == "vflair-core" or "vflair-core" in {r.name for r in ours}
    for requirement in ours:
        wanted = f"=={version}" if distribution is META else minor
        assert str(requirement.specifier) == wanted, requirement


@each
def test_addresses_are_those_of_the_project_or_there_are_none(distribution):
    """`nox -s home` writes them into every distribution at once."""
    core = BY_NAME["vflair-core"].project.get("urls", {})
    assert distribution.project.get("urls", {}) == core
    assert not core or {"Homepage", "Documentation", "Changelog", "Issues"} == set(core)
    assert all(address.startswith("https://") for address in core.values())


def test_the_changelog_begins_with_the_version():
    (first,) = re.findall(r"^## (\S+?),? ", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[:1]
    assert first == vflair_core.__version__


# -- what is needed --------------------------------------------------------------------------------------


def test_the_distribution_without_modules_brings_the_core_with_its_program_and_three_plugins():
    brought = {r.name: r.extras for r in requirements(META, extras=False)}
    assert sorted(brought) == OF_ALL
    assert brought["vflair-core"] == {"cli", "lora", "report", "study"}


def test_who_embeds_the_core_installs_no_program_and_no_adapters():
    core = BY_NAME["vflair-core"]
    needed = {canonicalize_name(r.name) for r in requirements(core, extras=False)}
    assert not needed & {"cyclopts", "rich", "peft", "accelerate", "grpcio", "matplotlib", "joblib"}
    assert {Requirement(text).name for text in core.extras["cli"]} == {"cyclopts", "rich"}
    assert {Requirement(text).name for text in core.extras["lora"]} == {"peft"}


def is_installed(name):
    return any(found.metadata["Name"] == name for found in importlib.metadata.distributions())


@each
def test_what_is_installed_here_is_what_is_declared(distribution):
    """As ``pip check`` would say it, of what the files say today."""
    needed = requirements(distribution, extras=False) if is_installed(distribution.name) else []
    for requirement in requirements(distribution):
        if requirement.name in BY_NAME:
            continue
        try:
            installed = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            assert requirement not in needed, f"{requirement} is not installed"
        else:
            assert requirement.specifier.contains(installed, prereleases=True), requirement


OF_OTHERS = {
    "huggingface-hub": "transformers",
    "markupsafe": "jinja2",
}  # and who needs them in turn
ASKED_FOR = {  # what is imported where somebody asks for it by name, and is told to install it if it is not there
    "vflair-core": {"pyarrow", "pytest", "ray"},
}
NAMES = {
    "PIL": "pillow",
    "grpc": "grpcio",
    "sklearn": "scikit-learn",
}  # where the distribution's is another


def imported_by(package):
    """Every distribution whose modules are imported somewhere in a package, type checkers' imports included."""
    found = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Import(names):
                    modules = [alias.name for alias in names]
                case ast.ImportFrom(module=str(module), level=0):
                    modules = [module]
                case _:
                    continue
            tops = {module.partition(".")[0] for module in modules}
            found |= tops - {package.name, "__future__"} - sys.stdlib_module_names
    return {canonicalize_name(NAMES.get(top, top)) for top in found}


@pytest.mark.parametrize(
    "distribution", [d for d in DISTRIBUTIONS if d.package], ids=lambda d: d.name
)
def test_a_package_declares_what_it_imports(distribution):
    declared = {canonicalize_name(r.name) for r in requirements(distribution)}
    core = {canonicalize_name(r.name) for r in requirements(BY_NAME["vflair-core"], extras=False)}
    known = declared | core  # a plugin has what the core needs
    beside = ASKED_FOR.get(distribution.name, set())
    of_others = {name for name, other in OF_OTHERS.items() if other in known}
    assert imported_by(distribution.package) - known - of_others <= beside


# -- what error texts say --------------------------------------------------------------------------------

SOURCES = [
    path
    for pattern in (
        "vflair_core/**/*",
        "plugins/**/*",
        "docs/*.md",
        "*.md",
        "examples/**/*",
        "benchmarks/*",
    )
    for path in ROOT.glob(pattern)
    if path.suffix in {".py", ".md", ".toml"}
]


def named_in(text):
    """Distribution and extras of each of ours that a text tells its readers to install."""
    for line in re.findall(r"pip install ([^\n]+)", text):
        for name, extras in re.findall(r"(?<![\w/.-])(vflair(?:-\w+)?)(?:\[([\w,-]+)\])?", line):
            yield name, [extra for extra in extras.split(",") if extra]


def test_what_texts_tell_to_install_exists():
    named = [(path, *said) for path in SOURCES for said in named_in(path.read_text())]
    assert len(named) > 20
    for path, name, extras in named:
        assert name in BY_NAME, f"{path}: {name}"
        assert set(extras) <= set(BY_NAME[name].extras), f"{path}: {name}{extras}"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("pip install 'vflair-core[cli,grpc]'.", [("vflair-core", ["cli", "grpc"])]),
        ("pip install vflair vflair-tasks[code])", [("vflair", []), ("vflair-tasks", ["code"])]),
        ("pip install -e plugins/vflair-tasks ./plugins/vflair", []),
    ],
)
def test_a_name_in_a_text_is_found(text, found):
    assert list(named_in(text)) == found
