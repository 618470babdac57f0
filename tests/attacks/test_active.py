"""A model party that cheats: what it may answer, what it is told, and how a run reports it."""

from __future__ import annotations

import copy

import pytest
import torch

import vflair_defenses
from support.paths import ACTIVE_ADVERSARIES, SAMPLE_PLUGIN
from support.small_models import LLAMA
from vflair_core import AttackError, Message, plugin_manager, read_experiment, run
from vflair_core.attacks.adversary import plausible
from vflair_core.cli.terminal import show_result
from vflair_core.communication.message import Crossing
from vflair_core.errors import ExperimentError
from vflair_core.experiments.attack_phase import attack_again
from vflair_core.experiments.config import experiment_from, to_toml
from vflair_core.experiments.experiment import AttackSpec


@pytest.fixture(scope="module")
def pm():
    manager = plugin_manager([SAMPLE_PLUGIN, ACTIVE_ADVERSARIES], entry_point_group="vflair.none")
    manager.register(vflair_defenses)
    return manager


def small(name, knowledge="K1", **changes):
    table = {
        "task": {"name": "words"},
        "model": {"config": LLAMA, "vocab_size": 300},
        "partition": {"head": 1, "tail": 1},
        "train": {"steps": 3, "batch_size": 4, "max_length": 16},
        "victims": {"count": 4, "max_length": 12, "bypass": 2},
        "attacks": [{"name": "first-row", "knowledge": "K1"}],
        "adversary": {"name": name, "knowledge": knowledge},
        "isolation": "inline",
        **changes,
    }
    return experiment_from(table)


@pytest.fixture(scope="module")
def honest(pm):
    return run(small("honest", defenses=[{"name": "shift"}]), plugins=pm)


def test_under_an_adversary_that_changes_nothing_everything_is_as_without(honest):
    for arm in ("undefended", "defended"):
        passive, active = (
            copy.deepcopy(honest.numbers[prefix + arm]) for prefix in ("", "active-")
        )
        *shared, own = active.pop("attacks")
        assert shared == passive.pop("attacks")
        assert own["attack"] == "honest"
        assert own["knowledge"] == "K1+adversary_state"
        seams = {row["seam"]: row for row in active["seams"]}
        assert seams["lengths"]["read_by"].pop()["attack"] == "honest"
        for numbers in (active, passive):
            numbers.pop("strongest")
            numbers.pop("evaluated", None)
        assert active == passive


def test_it_sees_every_backward_of_training_and_of_the_victims(honest):
    steps, victims = 3, 4
    own = honest.numbers["active-undefended"]["attacks"][-1]
    assert own["budget"] == {"seen": steps + victims}


def test_in_a_process_of_its_own_it_does_the_same(pm, honest):
    numbers = run(small("honest", isolation="process"), plugins=pm).numbers
    for arm in ("undefended", "active-undefended"):
        mine, theirs = (
            {k: v for k, v in n[arm].items() if k != "isolation"} for n in (honest.numbers, numbers)
        )
        assert mine == theirs


def test_a_head_that_gets_zero_gradients_stays_as_it_is(pm, tmp_path):
    """It is then the head of a run that trains nothing, and in the honest arm it is not."""
    run(small("freezing", save=True), plugins=pm, out=tmp_path)
    still = {"steps": 0, "max_length": 16}
    run(small("freezing", train=still, save=True), plugins=pm, out=tmp_path / "no")
    one, other, trained = (
        _head(tmp_path / "active-undefended"),
        _head(tmp_path / "no" / "undefended"),
        _head(tmp_path / "undefended"),
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not all(torch.equal(trained[name], other[name]) for name in one)


def _head(folder):
    from safetensors.torch import load_file

    (path,) = (p for p in folder.rglob("*.safetensors") if "data" in str(p))
    return {k: v for k, v in load_file(path).items() if "layers.0" in k or "embed" in k}


def test_an_answer_that_the_data_party_would_notice_is_refused(pm):
    with pytest.raises(AttackError, match=r"answered a backward with smashed_grad .* would notice"):
        run(small("clumsy"), plugins=pm)
    honest = Message("forward", "s", 0, 1, 1, tensors=(Crossing("a", "returned", torch.ones(2)),))
    with pytest.raises(AttackError, match="with 0 tensors where 1 were due"):
        plausible(Message("forward", "s", 0, 1, 1), honest)
    with pytest.raises(AttackError, match="answered with a NoneType"):
        plausible(None, honest)


def test_the_numbers_of_an_answer_are_those_of_the_request():
    crossing = Crossing("a", "returned", torch.ones(2))
    honest = Message("forward", "s", 3, 1, 7, tensors=(crossing,))
    answer = plausible(Message("close", "other", 0, 0, 0, tensors=(crossing,)), honest)
    assert (answer.kind, answer.session, answer.step, answer.exchange, answer.seq) == (
        "forward", "s", 3, 1, 7,
    )  # fmt: skip


@pytest.mark.parametrize("isolation", ["inline", "process"])
def test_an_adversary_that_fails_stops_the_run_by_name(pm, isolation):
    failure = ZeroDivisionError if isolation == "inline" else AttackError
    with pytest.raises(failure, match="on open"):
        run(small("failing", isolation=isolation), plugins=pm)


def test_a_watching_attack_is_no_adversary_and_an_adversary_no_watching_attack(pm):
    with pytest.raises(ExperimentError, match="only watches"):
        run(small("first-row"), plugins=pm)
    listed = small("honest", attacks=[{"name": "honest", "knowledge": ["K1", "adversary_state"]}])
    with pytest.raises(ExperimentError, match=r"Set \[adversary\] name = 'honest'"):
        run(listed, plugins=pm)


def test_before_anything_crosses_there_are_no_later_weights(pm):
    with pytest.raises(AttackError, match="needs current_head, which it is not granted"):
        run(small("greedy", "K4"), plugins=pm)


def test_the_report_shows_it_apart(honest, tmp_path, capsys):
    show_result(honest, tmp_path)
    said = " ".join(capsys.readouterr().out.split())
    passive, active = said.split("AP with its 95 % interval")[1:3]
    assert "first-row" in passive
    assert "honest" not in passive
    assert "first-row" in active
    assert "honest" in active


def test_the_table_reads_back(tmp_path):
    path = tmp_path / "experiment.toml"
    for e in (small("honest"), small("honest", adversary=None)):
        path.write_text(to_toml(e))
        assert read_experiment(path) == e


def test_kept_evidence_of_it_is_attacked_again(pm, tmp_path):
    whole = run(small("honest"), plugins=pm, out=tmp_path, keep_evidence=True)
    asked = [AttackSpec("honest", {}, ("K1", "adversary_state"))]
    grades = attack_again(tmp_path, asked, plugins=pm, isolation="inline")
    assert grades["undefended"] == []
    (again,) = grades["active-undefended"]
    assert again.budget == whole.numbers["active-undefended"]["attacks"][-1]["budget"]


def test_several_seeds_are_told_apart_too(pm):
    numbers = run(small("honest", seeds=[0, 1, 2, 3, 4]), plugins=pm).numbers
    assert [row["attack"] for row in numbers["over_seeds"]["attacks"]] == ["first-row"]
    found = numbers["over_seeds_active"]
    assert [row["attack"] for row in found["attacks"]] == ["first-row", "honest"]


def test_what_a_defense_measures_of_itself_afterwards_crosses_without_it(pm):
    """The adversary's process is over by then."""
    defense = {"name": "adversarial-training", "options": {"place": "tail"}}
    there = small(
        "honest",
        task={"name": "two-words"},
        model={"config": {**LLAMA, "attn_implementation": "eager"}, "vocab_size": 300},
        attacks=[],
        defenses=[defense],
        victims={"count": 4, "max_length": 12, "bypass": 2},
        isolation="process",
    )
    numbers = run(there, plugins=pm).numbers
    assert numbers["active-defended"]["findings"] == numbers["defended"]["findings"] != []
