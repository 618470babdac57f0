"""Victims have something that can be recovered, or a run says so before it trains anything."""

from __future__ import annotations

import pytest

from vflair_core import Example, Task
from vflair_core.errors import ExperimentError
from vflair_core.experiments.config import experiment_from
from vflair_core.experiments.victims import check_secrets

PUBLIC = Example("nothing here", private=())
SECRET = Example("Ada is here", private=((0, 3),))


def checked(examples, count=2):
    task = Task("t", "causal-lm", train=examples, test=examples)
    table = {"task": {"name": "t"}, "model": {"name": "m"}, "victims": {"count": count}}
    check_secrets(experiment_from(table), task)


def test_victims_without_secrets_are_refused_where_other_examples_have_some():
    with pytest.raises(ExperimentError, match=r"the first 2 .* Example 3 .* victims.count = 4"):
        checked([PUBLIC, PUBLIC, PUBLIC, SECRET])
    checked([PUBLIC, PUBLIC, PUBLIC, SECRET], count=4)


@pytest.mark.parametrize(
    "victim",
    [SECRET, Example("all of it"), Example("q", private=(), pair="p"), Example("q", private=(), pair="p", private_pair=((0, 1),))],
)  # fmt: skip
def test_one_victim_with_something_private_is_enough(victim):
    checked([PUBLIC, victim, SECRET])


def test_a_task_without_anything_private_is_a_tasks_own_affair():
    checked([PUBLIC] * 4)
