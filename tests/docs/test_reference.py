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

import vflair_core
from support.paths import DOCS
from vflair_core import hookspecs
from vflair_core.attacks.knowledge import PRESETS, VOCABULARY
from vflair_core.communication.message import Role
from vflair_core.experiments.config import experiment_from
from vflair_core.experiments.experiment import Experiment
from vflair_core.plugins import HOOKS

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
    meanings = {row[0]: row[1:] for row in rows(page("threat-models.md"))}
    assert meanings.get(f"`{name}`") == (VOCABULARY[name], first)


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
    assert mentioned <= set(HOOKS)


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


@pytest.mark.parametrize("name", vflair_core.__all__)
def test_every_public_name_is_in_the_api_page(name):
    documented = re.findall(r"^\.\. auto\w+:: vflair_core\.(\w+)", page("api.md"), re.MULTILINE)
    assert name == "__version__" or name in documented


def test_every_page_is_reachable_from_the_index():
    linked = set(re.findall(r"^([a-z-]+)$", page("index.md"), re.MULTILINE))
    assert {path.stem for path in DOCS.glob("*.md")} - {"index"} <= linked


# -- plugins ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plugin", ["attacks", "defenses"])
def test_the_page_of_a_plugin_names_everything_that_it_offers(plugin):
    said = (DOCS.parent / "plugins" / f"vflair-{plugin}" / "README.md").read_text()
    name = f"vflair_{plugin}"
    offered = getattr(importlib.import_module(name), name)()
    assert {thing for thing in offered if f"`{thing}`" not in said} == set()
