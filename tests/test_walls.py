"""The rooms are those of docs/architecture.md, and who embeds the core loads no experiment."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vflair_core
import vflair_core.testing
from support.paths import DOCS, ROOT

CORE = Path(vflair_core.__file__).parent
ROOMS = sorted(path.parent for path in CORE.rglob("__init__.py") if path.parent != CORE)


def loaded_after(code: str) -> set[str]:
    """The modules that a fresh process has after running `code`."""
    code += "\nimport sys; print('\\n'.join(sys.modules), end='')"
    run = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=os.environ
    )
    return set(run.stdout.split("\n"))


def rooms_in(page: str) -> dict[str, str]:
    """The rooms of the table of a page, and what it says that each is for."""
    return dict(
        re.findall(
            r"^\| \[?`vflair_core/([\w/]+)/`(?:\]\([^)]*\))? \| (.+) \|$", page, re.MULTILINE
        )
    )


# -- rooms -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "page", [DOCS / "architecture.md", ROOT / "README.md"], ids=lambda p: p.name
)
def test_the_table_of_rooms_is_the_tree(page):
    listed = rooms_in(page.read_text())
    wanted = {str(room.relative_to(CORE)) for room in ROOMS}
    if page.name == "README.md":  # the first level, for who sees the house for the first time
        wanted = {room for room in wanted if "/" not in room}
    assert set(listed) == wanted


def test_every_file_of_a_room_has_a_line_in_the_architecture():
    page = (DOCS / "architecture.md").read_text()
    for room in ROOMS:
        name = str(room.relative_to(CORE))
        section = re.search(
            rf"^##+ `{re.escape(name)}/`\n(.*?)(?=^##|\Z)", page, re.MULTILINE | re.DOTALL
        )
        assert section, f"{name} has no section"
        listed = set(re.findall(r"^\| `(\w+\.py)` \|", section[1], re.MULTILINE))
        files = {path.name for path in room.glob("*.py")} - {"__init__.py"}
        assert listed == files, name


def test_there_are_ten_rooms_and_few_doors():
    assert len([room for room in ROOMS if room.parent == CORE]) == 10
    assert len(list(CORE.glob("*.py"))) <= 10


@pytest.mark.parametrize(
    "room",
    [room for room in ROOMS if room.name != "testing"],  # which has a face of its own
    ids=lambda room: str(room.relative_to(CORE)),
)
def test_a_room_has_a_sentence_and_imports_nothing(room):
    sign = (room / "__init__.py").read_text()
    assert sign.startswith('"""')
    assert "import" not in sign.split('"""')[2]


# -- what is loaded --------------------------------------------------------------------------------------


def test_who_embeds_the_core_loads_no_experiment():
    pytest.importorskip("vflair_defenses")
    code = "from vflair_core import split\nfrom vflair_defenses.gaussian_noise import GaussianNoise"
    modules = loaded_after(code)
    heavy = {"cattrs", "rich", "cyclopts"}
    rooms = ("vflair_core.experiments", "vflair_core.cli", "vflair_core.attacks")
    assert "vflair_core.parties.split" in modules
    assert not [name for name in modules if name.startswith(rooms) or name in heavy]


def test_help_loads_no_torch():
    code = (
        "import contextlib, io, sys\nsys.argv = ['vflair', '--help']\n"
        "from vflair_core.cli.main import main\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n    main()"
    )
    assert "torch" not in loaded_after(code)


def test_the_core_alone_loads_no_torch():
    assert "torch" not in loaded_after(
        "import vflair_core, vflair_core.hookspecs, vflair_core.plugins"
    )


# -- the face --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "page",
    [*DOCS.glob("*.md"), *ROOT.glob("*.md"), CORE / "README.md", *ROOT.glob("plugins/*/README.md")],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_pages_import_the_face_of_the_core_only(page):
    inner = re.findall(r"^\s*(?:from|import) (vflair_core\.[\w.]+)", page.read_text(), re.MULTILINE)
    assert set(inner) <= {"vflair_core.testing"}


@pytest.mark.parametrize("face", [vflair_core, vflair_core.testing], ids=lambda f: f.__name__)
def test_every_public_name_is_loaded_from_where_it_is_made(face):
    for name, home in face._HOMES.items():
        made = getattr(face, name)
        module = getattr(made, "__module__", f"{face.__name__}.{home}")
        assert not module.startswith("vflair_core") or module == f"{face.__name__}.{home}", name
