"""Nothing is left out of the reference pages, and nothing there differs from the code."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import attrs
import pytest
from _pytest.fixtures import FixtureFunctionDefinition

import vflair_core
from support.paths import DOCS
from vflair_core import hookspecs, testing
from vflair_core.attacks.knowledge import PRESETS, VOCABULARY
from vflair_core.communication.message import Role
from vflair_core.experiments.config import experiment_from
from vflair_core.experiments.experiment import Experiment
from vflair_core.plugins import HOOKS
from vflair_core.testing import fixtures

SHORTEST = {"task": {"name": "t"}, "model": {"name": "m"}}  # what an experiment cannot do without


def page(name: str) -> str:
    return (DOCS / name).read_text()


def rows(text: str) -> list[tuple[str, ...]]:
    """The rows of all tables of a page, cell by cell; \\| is a bar inside a cell."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    return [tuple(cell.strip().replace(r"\|", "|") for cell in row) for row in cells]


# -- experiments -----------------------------------------------------------------------------------------


def records(kind: type, prefix: str = "") -> dict[str, type]:
    """Every table of an experiment file by its heading, `Experiment` itself under the empty name."""
    found = {prefix: kind}
    hints = typing.get_type_hints(kind)
    for field in attrs.fields(kind):
        inner, is_list = hints[field.name], False
        if get_origin(inner) is tuple:
            inner, is_list = get_args(inner)[0], True
        if attrs.has(inner):
            path = f"{prefix.strip('[]')}.{field.name}".lstrip(".")
            key = f"[[{path}]]" if is_list else f"[{path}]"
            found |= records(inner, key)
    return found


def described(kind: type) -> dict[str, str]:
    """What the docstring of a record says about each of its fields."""
    section = re.search(r"(?:Attributes|Args):\n(.*)", inspect.getdoc(kind) or "", re.DOTALL)
    assert section is not None, kind
    flat = re.sub(r"\n\s{5,}", " ", section.group(1))
    return dict(re.findall(r"^\s*(\w+): (.*)$", flat, re.MULTILINE))


def type_word(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(f'`"{word}"`' for word in get_args(kind))
    if get_origin(kind) is tuple:
        return (
            f"list of {'tables' if attrs.has(get_args(kind)[0]) else type_word(get_args(kind)[0])}"
        )
    if isinstance(kind, types.UnionType):
        parts = [part for part in get_args(kind) if part is not types.NoneType]
        return " or ".join(type_word(part) for part in parts)
    if attrs.has(kind) or get_origin(kind) is Mapping:
        return "table"
    return {int: "integer", float: "number", str: "text", bool: "boolean"}[kind]


def default_word(field: Any) -> str:
    default = field.default
    if isinstance(default, attrs.Factory):  # type: ignore[arg-type]
        default = default.factory()
    if default is attrs.NOTHING:
        return "needed"
    if default is None:  # a key that TOML can only leave out
        return "left out"
    if attrs.has(type(default)):
        return "its defaults"
    if isinstance(default, Mapping):
        return "`{}`"
    return f"`{json.dumps(list(default) if isinstance(default, tuple) else default)}`"


def table_of(kind: type) -> list[tuple[str, ...]]:
    hints, says = typing.get_type_hints(kind), described(kind)
    return [
        (f"`{f.name}`", type_word(hints[f.name]), default_word(f), says[f.name])
        for f in attrs.fields(kind)
    ]


def heading(key: str) -> str:
    return f"### `{key}`" if key else "### Top level"


@pytest.mark.parametrize("key", records(Experiment), ids=lambda key: key or "top level")
def test_every_key_of_an_experiment_is_documented_with_its_type_default_and_meaning(key):
    text = page("experiments.md")
    assert heading(key) in text, f"experiments.md has no section {heading(key)!r}"
    section = re.split(r"^##", text.split(heading(key), 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    expected = table_of(records(Experiment)[key])
    there = [row for row in rows(section) if row[0].startswith("`")]
    wanted = "\n".join(f"| {' | '.join(row)} |" for row in expected)
    assert there == expected, f"{heading(key)} must hold:\n{wanted}"


def test_a_record_that_nests_another_way_would_be_noticed():
    assert set(records(Experiment)) == {
        "", "[task]", "[model]", "[pretrain]", "[partition]", "[train]", "[train.lora]", "[[defenses]]", "[[attacks]]",
        "[victims]",
    }  # fmt: skip


def test_documented_defaults_are_those_of_a_file_that_leaves_everything_out():
    shortest = experiment_from(SHORTEST).to_dict()
    for name, _, default, _ in table_of(Experiment):
        if default.startswith("`"):
            assert json.loads(default.strip("`")) == json.loads(
                json.dumps(shortest[name.strip("`")])
            )


# -- knowledge and roles ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VOCABULARY)
def test_every_name_of_the_vocabulary_is_documented_with_the_first_preset_that_grants_it(name):
    first = next((preset for preset, names in PRESETS.items() if name in names), "by name")
    each = [row for row in rows(page("threat-models.md")) if row[0] == f"`{name}`"]
    assert (VOCABULARY[name], first) in [
        row[1:] for row in each
    ]  # another table has seams of that name


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_documented(preset):
    assert f"`{preset}`" in {row[0] for row in rows(page("threat-models.md"))}


@pytest.mark.parametrize("role", get_args(Role))
def test_every_role_of_a_crossing_tensor_is_documented(role):
    assert f"`{role}`" in {row[0] for row in rows(page("concepts.md"))}


# -- hooks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_documented_with_its_arguments(hook):
    kind = next(kind for kind in hookspecs.KINDS if hook in vars(kind))
    parameters = [p for p in inspect.signature(vars(kind)[hook]).parameters if p != "self"]
    documented = {row[0] for row in rows(page("hooks.md"))}
    assert f"`{hook}({', '.join(parameters)})`" in documented


def test_no_hook_is_documented_that_does_not_exist():
    pages = "".join(path.read_text() for path in DOCS.glob("*.md"))
    mentioned = set(re.findall(r"\bvflair_[a-z_]+(?=\()", pages))
    assert mentioned <= {*HOOKS, *fixtures_of(fixtures)}


def test_the_fixtures_and_no_others_are_on_the_page_of_the_first_plugin():
    page = (DOCS / "first-plugin.md").read_text()
    named = set(re.findall(r"^\| `(vflair_\w+)", page, re.MULTILINE)) - {"vflair_word_shuffle"}
    assert named == fixtures_of(fixtures)


def test_every_hook_is_called_somewhere_in_the_core():
    sources = [
        path.read_text()
        for path in Path(inspect.getfile(vflair_core)).parent.rglob("*.py")
        if path.name != "hookspecs.py"
    ]
    code = "\n".join(re.sub(r'""".*?"""', "", source, flags=re.DOTALL) for source in sources)
    offered = {"vflair_attacks", "vflair_defenses", "vflair_tasks", "vflair_commands"}
    watched = {"vflair_message_sent", "vflair_message_received"}  # told by their direction
    assert 'f"vflair_{shelf}"' in code
    assert 'f"vflair_message_{direction}"' in code
    for hook in set(HOOKS) - offered - watched:
        assert re.search(rf'[".]{hook}\b', code), f"{hook} is specified and never called"


# -- names -----------------------------------------------------------------------------------------------


def documented(module: str) -> list[str]:
    """The names of a module that the page about the API has an entry for."""
    entry = rf"^\.\. (?:auto|py:)\w+:: {re.escape(module)}\.(\w+)$"
    return re.findall(entry, page("api.md"), re.MULTILINE)


def fixtures_of(module: types.ModuleType) -> set[str]:
    """The fixtures of a module, as pytest knows them."""
    return {
        name for name, value in vars(module).items() if isinstance(value, FixtureFunctionDefinition)
    }


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("vflair_core", set(vflair_core.__all__) - {"__version__"}),
        ("vflair_core.testing", set(testing.__all__)),
        ("vflair_core.testing.fixtures", fixtures_of(fixtures)),
    ],
    ids=["core", "testing kit", "fixtures"],
)
def test_every_public_name_is_in_the_api_page_once_and_no_other(module, names):
    assert names
    assert sorted(documented(module)) == sorted(names)


def test_every_page_is_in_the_sidebar_once():
    listed = re.findall(r"^([a-z-]+)$", page("index.md"), re.MULTILINE)
    assert sorted(listed) == sorted({path.stem for path in DOCS.glob("*.md")} - {"index"})


def test_every_part_of_the_sidebar_has_a_caption():
    trees = re.findall(r"^```\{toctree\}\n(.*?)^```$", page("index.md"), re.DOTALL | re.MULTILINE)
    captions = [re.findall(r"^:caption: (.+)$", tree, re.MULTILINE) for tree in trees]
    assert [caption for (caption,) in captions] == [
        "Begin", "For researchers", "For engineers", "For integrators", "Reference", "The project",
    ]  # fmt: skip


def test_the_page_of_each_kind_of_user_comes_first_in_its_part():
    for kind in ("researcher", "engineer", "integrator"):
        part = page("index.md").split(f":caption: For {kind}s\n", 1)[1]
        assert part.split()[:2] == [":hidden:", kind]


def test_every_figure_of_the_gallery_has_a_text_instead_a_command_and_a_file():
    entries = re.split(r"^## ", page("gallery.md"), flags=re.MULTILINE)[1:]
    assert entries
    for entry in entries:
        figures = re.findall(r"^!\[(.*?)\]\((.+?)\)$", entry, re.MULTILINE)
        assert figures, entry.splitlines()[0]
        assert all(len(instead) > 40 for instead, _ in figures), entry.splitlines()[0]
        assert "```bash\n" in entry, entry.splitlines()[0]
        assert all((DOCS / file).is_file() for _, file in figures)


def test_every_image_is_shown_somewhere():
    shown = "".join(path.read_text() for path in DOCS.glob("*.md"))
    assert [image.name for image in (DOCS / "images").iterdir() if image.name not in shown] == []


# -- plugins ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plugin", ["attacks", "defenses"])
def test_the_page_of_a_plugin_names_everything_that_it_offers(plugin):
    said = (DOCS.parent / "plugins" / f"vflair-{plugin}" / "README.md").read_text()
    name = f"vflair_{plugin}"
    offered = getattr(importlib.import_module(name), name)()
    assert {thing for thing in offered if f"`{thing}`" not in said} == set()
