"""Every task is offered with a card, and is described on the page of tasks."""

from __future__ import annotations

import importlib
import inspect

import pytest

import vflair_tasks
from support.paths import DOCS
from vflair_core import TaskCard

PAGE = (DOCS / "tasks.md").read_text()
OFFERED = vflair_tasks.vflair_tasks()


@pytest.mark.parametrize("name", OFFERED)
def test_a_task_has_a_card_a_text_and_options_with_defaults(name):
    module, _, attribute = OFFERED[name].partition(":")
    make = getattr(importlib.import_module(module), attribute)
    assert isinstance(make.card, TaskCard)
    assert make.card.metric
    assert make.card.source
    assert make.card.licence
    assert inspect.getdoc(make)
    needed = [p.name for p in inspect.signature(make).parameters.values() if p.default is p.empty]
    assert needed == (["data", "kind", "text"] if name == "own" else [])
    if name != "own":
        assert make.card.sizes.keys() == {"train", "test"}


@pytest.mark.parametrize("name", OFFERED)
def test_a_task_is_on_the_page_of_tasks(name):
    assert f"| `{name}` |" in PAGE
