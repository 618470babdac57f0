"""What an attack had recovered after a part of its budget, and what it recovered of responses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vflair_attacks
from support.paths import SAMPLE_PLUGIN, TASK_KINDS
from support.small_models import LLAMA
from vflair_core import plugin_manager, run
from vflair_core.attacks.guess_files import Progression
from vflair_core.cli.terminal import show_result
from vflair_core.experiments.config import experiment_from


@pytest.fixture(scope="module")
def pm():
    manager = plugin_manager([SAMPLE_PLUGIN, TASK_KINDS], entry_point_group="vflair.none")
    manager.register(vflair_attacks)
    return manager


def small(**changes):
    table = {
        "task": {"name": "words"},
        "model": {"config": LLAMA, "vocab_size": 300},
        "partition": {"head": 1, "tail": 1},
        "train": {"steps": 2, "batch_size": 4, "max_length": 16},
        "victims": {"count": 5, "max_length": 12, "bypass": 2, "development": 1},
        "isolation": "inline",
        **changes,
    }
    return experiment_from(table)


def attacks_of(numbers, arm="undefended"):
    return numbers[arm]["attacks"]


@pytest.mark.parametrize(
    ("name", "options"),
    [("vocabulary-search", {"prior": 0.0}), ("vmi", {"steps": 120, "restarts": 1})],
)
def test_a_point_of_the_course_is_what_an_attack_with_that_budget_recovers(pm, name, options):
    """Of a descent the last step is longer where it ends, so points on the way are at its checks: the rate differs."""
    spec = {"name": name, "knowledge": "K3", "options": options}
    (whole,) = attacks_of(run(small(attacks=[spec]), plugins=pm).numbers)
    points = whole["course"]
    assert points[-1]["forwards"] == whole["budget"]["forwards"]
    assert points[-1]["attack_performance"] == whole["attack_performance"]
    assert len({point["forwards"] for point in points}) > 2
    each = [int(point["forwards"]) // 5 for point in points[:3]]  # a limit is for each victim
    limited = [{**spec, "options": {**options, "forwards": forwards}} for forwards in each]
    alone = attacks_of(run(small(attacks=limited), plugins=pm).numbers)
    reached = [grade["attack_performance"] for grade in alone]
    assert reached == [point["attack_performance"] for point in points[:3]]


def test_seconds_of_a_course_are_costs_and_no_numbers(pm):
    spec = {"name": "greedy-search", "knowledge": "K3"}
    result = run(small(attacks=[spec]), plugins=pm)
    (grade,) = attacks_of(result.numbers)
    assert all(set(point) == {"forwards", "attack_performance"} for point in grade["course"])
    (seconds,) = result.cost["undefended"]["course_seconds"]
    assert len(seconds) == len(grade["course"])
    assert seconds == sorted(seconds)


def test_the_report_tells_the_course(pm, tmp_path, capsys):
    spec = {"name": "greedy-search", "knowledge": "K3"}
    result = run(small(attacks=[spec]), plugins=pm)
    show_result(result, tmp_path, verbose=True)
    said = " ".join(capsys.readouterr().out.split())
    (grade,) = attacks_of(result.numbers)
    last = grade["course"][-1]
    assert f"{last['attack_performance']:.3f} after {last['forwards']:,.0f} forwards." in said


@given(st.integers(1, 200), st.integers(2, 16).map(lambda n: 2 * n))
def test_a_course_keeps_points_at_even_distances(calls, most):
    course = Progression(most=most)
    for n in range(1, calls + 1):
        course.add(n, 0.0, torch.tensor([[n]]))
    kept = [forwards for forwards, _, _ in course.points]
    assert len(kept) < most
    assert len({b - a for a, b in zip([0, *kept], kept, strict=False)}) == 1
    assert len(kept) >= min(calls, most // 2) // 2
    assert [int(tokens) for _, _, tokens in course.points] == kept


def test_prompt_and_response_are_graded_apart(pm, tmp_path, capsys):
    """With nothing before the cut all tokens are read, of prompts and of answers; the floors are of each."""
    result = run(
        small(
            task={"name": "colours"},
            partition={"head": 0, "tail": 1},
            attacks=[{"name": "nearest", "knowledge": "K3"}],
            defenses=[{"name": "blank"}],
            victims={"count": 12, "max_length": 48, "bypass": 2},
        ),
        plugins=pm,
    )
    for arm in ("undefended", "defended"):
        prompt, response = attacks_of(result.numbers, arm)
        assert (prompt["target"], response["target"]) == ("tokens", "response")
        assert response["attack_performance"] == 1.0
        assert response["floor"] < 1.0
        assert response["floors"] != prompt["floors"]
        assert response["verdict"] == "ok"
    assert prompt["attack_performance"] < 1.0  # the defense replaced names, and left answers alone
    assert [row["target"] for row in result.numbers["dcs"]["per_attack"]] == ["tokens", "response"]
    assert {row["target"] for row in result.numbers["undefended"]["strongest"]} == {
        "tokens",
        "response",
    }
    show_result(result, tmp_path, verbose=True)
    assert "nearest, response" in " ".join(capsys.readouterr().out.split())
