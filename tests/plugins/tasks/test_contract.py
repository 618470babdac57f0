"""What every task owes; those that need no network are tried here."""

from __future__ import annotations

import pytest

from vflair_core.offers import load_target
from vflair_core.testing import assert_task_contract
from vflair_tasks import vflair_tasks

OFFLINE = (
    "python-manual",
    "manual-chapters",
    "manual-similarity",
    "planted-records",
    "record-questions",
    "record-answers",
    "record-choices",
    "record-summaries",
    "record-drawings",
)


@pytest.mark.parametrize("name", OFFLINE)
def test_a_task_keeps_its_contract(name):
    assert_task_contract(load_target(vflair_tasks()[name]))
