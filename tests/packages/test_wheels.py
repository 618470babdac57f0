"""What is built of each distribution holds what it should, says what it is, and is the same whoever builds it."""

from __future__ import annotations

import io
import re
import shutil
import tarfile

import pytest

from support.distributions import DISTRIBUTIONS, build, files_of, metadata_of
from support.paths import ROOT

LICENCE = (ROOT / "LICENSE").read_bytes()
each = pytest.mark.parametrize("built", DISTRIBUTIONS, ids=lambda d: d.name, indirect=True)


@pytest.fixture(scope="module")
def made():
    return {}


@pytest.fixture
def built(request, made, tmp_path_factory):
    """A distribution with its wheel and its sdist, which are built once."""
    distribution = request.param
    if distribution.name not in made:
        into = tmp_path_factory.mktemp(distribution.name)
        made[distribution.name] = [
            build(distribution.folder, into, target) for target in ("wheel", "sdist")
        ]
    return distribution, *made[distribution.name]


def modules_of(distribution):
    """Every file that a package needs when it is installed, as git would keep it."""
    package = distribution.package
    if package is None:
        return {}
    return {
        str(path.relative_to(distribution.folder)): path.read_bytes()
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path != package / "README.md"
    }


@each
def test_a_wheel_holds_the_package_its_licence_and_nothing_else(built):
    distribution, wheel, _ = built
    found = files_of(wheel)
    facts = {name: text for name, text in found.items() if ".dist-info/" in name}
    assert {name: text for name, text in found.items() if name not in facts} == modules_of(
        distribution
    )
    assert [text for name, text in facts.items() if name.endswith("/licenses/LICENSE")] == [LICENCE]
    assert {name.partition("/")[2] for name in facts} - {"entry_points.txt"} == {
        "METADATA", "RECORD", "WHEEL", "licenses/LICENSE"
    }  # fmt: skip


@each
def test_a_wheel_of_modules_tells_type_checkers_that_they_are_typed(built):
    distribution, wheel, _ = built
    names = [name for name in files_of(wheel) if name.endswith("/py.typed")]
    modules = [] if distribution.package is None else [f"{distribution.package.name}/py.typed"]
    assert names == modules
    assert ("Typing :: Typed" in metadata_of(wheel).get_all("Classifier")) == bool(modules)


@each
def test_the_metadata_say_what_it_is_whose_and_under_which_licence(built):
    distribution, wheel, _ = built
    told = metadata_of(wheel)
    assert told["Name"] == distribution.name
    assert told["License-Expression"] == "Apache-2.0"
    assert told.get_all("License-File") == ["LICENSE"]
    assert told["Author"] == "The vflair authors"
    assert told["Requires-Python"] == ">=3.11"
    assert told["Summary"]
    assert {"split learning", "large language models"} <= set(told["Keywords"].split(","))
    for kind in ("Development Status", "Intended Audience", "Programming Language", "Topic"):
        assert [c for c in told.get_all("Classifier") if c.startswith(f"{kind} :: ")], kind


def targets(page: str) -> list[str]:
    """Where the links and images of a page of Markdown lead, whichever way they are written."""
    page = re.sub(r"^```.*?^```$|`[^`\n]*`", "", page, flags=re.DOTALL | re.MULTILINE)
    inline = re.findall(r"\]\(\s*<?([^)>\s]+)", page)
    named = re.findall(r"^\s*\[[^\]]+\]:\s*<?(\S+?)>?$", page, re.MULTILINE)
    return inline + named + re.findall(r"(?:href|src)\s*=\s*[\"']?([^\"'\s>]+)", page)


@each
def test_the_long_description_stands_alone(built):
    distribution, wheel, _ = built
    told = metadata_of(wheel)
    page = str(told.get_payload())
    assert told["Description-Content-Type"] == "text/markdown"
    assert [target for target in targets(page) if not re.match(r"https://|#", target)] == []
    install = re.search(r"^## Install\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)
    assert install, "it does not say how it is installed"
    words = [
        re.split(r"\s+", line)
        for line in re.findall(r"pip install (.+)$", install[1], re.MULTILINE)
    ]
    assert any(word.strip("'\"`") == distribution.name for line in words for word in line)


@pytest.mark.parametrize(
    "link", ["[a](docs/a.md)", "![a](a.png)", "[a]: ../a.md", '<img src="a.png">', "[a](mailto:x)"]
)
def test_a_link_that_would_lead_nowhere_is_noticed(link):
    (target,) = targets(link)
    assert not re.match(r"https://|#", target)


@each
def test_an_sdist_holds_what_the_wheel_is_built_of_and_little_else(built):
    distribution, _, sdist = built
    found = files_of(sdist)
    beside = {
        name for name in found if name.partition("/")[0] != distribution.name.replace("-", "_")
    }
    wanted = {"LICENSE", "PKG-INFO", "pyproject.toml", ".gitignore"}
    wanted |= {"CHANGELOG.md"} if distribution.folder == ROOT else {"README.md"}
    assert beside == wanted
    assert modules_of(distribution).items() <= found.items()


@each
def test_the_wheel_of_the_sdist_is_the_wheel_of_the_folder(built, tmp_path):
    _, wheel, sdist = built
    with tarfile.open(fileobj=io.BytesIO(sdist.read_bytes())) as source:
        source.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.4 and later
        source.extractall(tmp_path / "source")
    (folder,) = (tmp_path / "source").iterdir()
    (tmp_path / "out").mkdir()
    again = build(folder, tmp_path / "out", "wheel")
    assert again.name == wheel.name
    assert again.read_bytes() == wheel.read_bytes()


@each
def test_whoever_builds_it_gets_the_same_bytes(built, tmp_path):
    """In another folder, with files of another day and a umask that lets nobody else read."""
    distribution, *files = built
    names = [".gitignore", "pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md"]
    copy = tmp_path / "elsewhere"
    copy.mkdir(0o700)
    shutil.copy(ROOT / ".gitignore", copy)
    for name in names:
        if (distribution.folder / name).exists():
            shutil.copyfile(distribution.folder / name, copy / name)
    if distribution.package is not None:
        shutil.copytree(
            distribution.package, copy / distribution.package.name, copy_function=shutil.copyfile
        )
    (tmp_path / "out").mkdir()
    for target, file in zip(("wheel", "sdist"), files, strict=True):
        again = build(copy, tmp_path / "out", target, umask=0o077)
        assert again.read_bytes() == file.read_bytes(), target
