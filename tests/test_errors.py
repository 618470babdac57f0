"""What an error says of names: what was perhaps meant, and what there is."""

from __future__ import annotations

import pytest

from vflair_core.attacks.knowledge import granted
from vflair_core.errors import AttackError, PluginError, alternatives
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
