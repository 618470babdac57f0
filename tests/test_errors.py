"""What an error says of names: what was perhaps meant, and what there is."""

from __future__ import annotations

import pickle

import pytest

from vflair_core import errors
from vflair_core.attacks.knowledge import granted
from vflair_core.errors import AttackError, LeakError, PluginError, VflairError, alternatives, shown
from vflair_core.offers import find
from vflair_core.plugins import plugin_manager


def test_of_few_names_all_are_listed_and_the_nearest_is_suggested():
    assert (
        alternatives("tran", ("train", "test")) == " Did you mean 'train'? Possible: train, test."
    )
    assert alternatives("x", ("train", "test")) == " Possible: train, test."
    assert alternatives("x", ()) == " Possible: none."


def test_of_many_names_the_nearest_five_are_listed_with_how_many_there_are():
    names = [f"task-{letter}{letter}" for letter in "abcdefghijkl"]
    said = alternatives("task-cd", names)
    listed = said.partition("Possible: ")[2].partition(" (")[0].split(", ")
    assert len(listed) == 5
    assert set(listed[:2]) == {"task-cc", "task-dd"}
    assert "(the nearest of 12)" in said


@pytest.mark.parametrize("shelf", ["attacks", "defenses", "tasks"])
def test_no_look_up_by_name_lists_everything_that_is_installed(shelf):
    with pytest.raises(PluginError) as raised:
        find(plugin_manager(), shelf, "no-such-name")
    listed = str(raised.value).partition("Possible: ")[2].partition(" (")[0]
    assert len(listed.split(", ")) == 5


def test_knowledge_that_does_not_exist_is_answered_with_the_nearest_names():
    with pytest.raises(
        AttackError, match=r"Did you mean 'smashed'\? Possible: smashed, .*nearest of"
    ):
        granted("smased")


KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, VflairError)
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_no_text_of_an_error_is_longer_than_the_law_however_it_is_made(kind):
    class Rude(kind):
        def __init__(self, text):
            Exception.__init__(self, text)  # past our own

    text = "begin" + "x" * 10**6 + "end"
    for error in (kind(text), Rude(text)):
        assert len(str(error)) == len(f"{error}") == errors.LONGEST
        assert str(error).startswith("begin")
        assert str(error).endswith("end")
    assert len(repr(kind(text))) < errors.LONGEST + 100
    assert str(kind("as it is")) == "as it is"


def test_an_error_that_crossed_a_process_is_the_same():
    error = pickle.loads(pickle.dumps(LeakError("text", "name")))
    assert (str(error), error.tensor) == ("text", "name")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "None"),
        ([1, "a", True], "[1, 'a', True]"),
        (b"\0" * 10**7, "10000000 bytes"),
        ({"kind": {"of": {"a": {"b": 1}}}}, "{'kind': {'of': {'a': {...}}}}"),
    ],
    ids=["nothing", "list", "bytes", "nested"],
)
def test_a_value_is_shown_by_its_beginning(value, said):
    assert shown(value) == said


@pytest.mark.parametrize(
    "value",
    [
        "é\0" * 10**6,
        [["x" * 1000] * 1000] * 1000,
        {str(n): [n] * 9 for n in range(10**4)},
        2**64 - 1,
    ],
    ids=["text", "lists", "map", "number"],
)
def test_a_shown_value_is_short_whatever_it_is(value):
    assert 0 < len(shown(value)) <= 200
    assert "\0" not in shown(value)
