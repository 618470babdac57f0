"""An attack is adaptive if being told of a mapping lets it see through it, or being told of the defense helps it."""

from __future__ import annotations

import pytest
import torch

import vflair_attacks
import vflair_defenses
from support.paths import CHEATING_ATTACKS, SAMPLE_PLUGIN
from support.small_models import LLAMA
from vflair_core import Guess, attack_again, plugin_manager, run
from vflair_core.attacks.attack import Launch
from vflair_core.experiments.config import experiment_from
from vflair_core.experiments.experiment import AttackSpec
from vflair_core.experiments.grading import adaptive_contract
from vflair_core.experiments.grading.adaptive_contract import (
    Contract,
    Mapped,
    judge_adaptive,
    twin_of,
)
from vflair_core.experiments.grading.answer_key import AnswerKey
from vflair_core.experiments.grading.grades import Grade
from vflair_core.experiments.grading.truth import Truth


@pytest.fixture
def pm():
    manager = plugin_manager([SAMPLE_PLUGIN, CHEATING_ATTACKS], entry_point_group="vflair.none")
    manager.register(vflair_attacks)
    manager.register(vflair_defenses)
    return manager


def experiment(attacks, defense, **changes):
    return experiment_from(
        {
            "task": {"name": "words"},
            "model": {"config": LLAMA, "vocab_size": 300},
            "partition": {"head": 1, "tail": 1},
            "train": {"steps": 1, "batch_size": 4, "max_length": 12},
            "victims": {"count": 6, "max_length": 12, "bypass": 2, "companions": 0},
            "isolation": "inline",
            "defenses": [defense],
            "attacks": attacks,
            **changes,
        }
    )


NOISE = {"name": "gaussian-noise", "options": {"noise_multiplier": 0.01}}
SEARCH = {"name": "vocabulary-search", "knowledge": "K4", "options": {"prior": 0.0}}


def test_who_asks_and_ignores_is_not_adaptive_and_who_uses_it_is(pm):
    ignores = {"name": "asks-and-ignores", "knowledge": "K4"}
    ignored, used = run(experiment([ignores, SEARCH], NOISE), plugins=pm).numbers["defended"][
        "attacks"
    ]
    assert ignored["verdict"] == used["verdict"] == "ok"
    assert not ignored["adaptive"]
    assert ignored["contract"]["told"] == ignored["contract"]["blind"]
    assert used["adaptive"]
    assert used["contract"]["told"] >= 0.99 * used["contract"]["open"]
    assert used["contract"]["blind"] <= 0.1


def test_a_defense_with_no_other_attack_than_one_that_ignores_it_is_not_evaluated(pm):
    ignores = {"name": "asks-and-ignores", "knowledge": "K4"}
    assert not run(experiment([ignores], NOISE), plugins=pm).numbers["defended"]["evaluated"][
        "tokens"
    ]
    assert run(experiment([SEARCH], NOISE), plugins=pm).numbers["defended"]["evaluated"]["tokens"]


def test_in_a_worker_and_again_from_kept_evidence_the_contract_is_the_same(pm, tmp_path):
    e = experiment([SEARCH], NOISE, isolation="process")
    (grade,) = run(e, plugins=pm, out=tmp_path, keep_evidence=True).numbers["defended"]["attacks"]
    (again,) = attack_again(
        tmp_path, [AttackSpec("vocabulary-search", {"prior": 0.0}, "K4")], plugins=pm
    )["defended"]
    assert again.contract == grade["contract"]
    assert again.adaptive


def test_who_learns_from_queries_learns_the_mapping(pm):
    """Its twin learns from queries that went another way."""
    learned = {
        "name": "inverter",
        "knowledge": ["K1", "queries"],
        "options": {"network": "mlp", "steps": 300},
    }
    e = experiment([learned], NOISE)
    (grade,) = run(e, plugins=pm).numbers["defended"]["attacks"]
    contract = grade["contract"]
    assert grade["adaptive"] == contract["kept"]
    assert contract["told"] >= 0.9 * contract["open"]
    assert contract["blind"] <= 0.2 < contract["told"]


@pytest.mark.parametrize("attack", ["label-enumeration", "gradient-sign"])
def test_an_attack_on_labels_is_tried_on_gradients(pm, attack):
    """The first mapping leaves the two classes of enumeration where they are: another is tried."""
    labels = {"name": attack, "knowledge": "K4"}
    e = experiment(
        [labels],
        {
            "name": "laplace-noise",
            "options": {"epsilon": 1e6, "gradient_epsilon": 1e6, "gradient_clip": 10.0},
        },
        task={"name": "two-words"},
        model={"config": LLAMA, "vocab_size": 300},
        partition={"head": 1, "tail": int(attack == "label-enumeration")},
        victims={"count": 24, "max_length": 12, "bypass": 8, "companions": 0},
    )
    (grade,) = run(e, plugins=pm).numbers["defended"]["attacks"]
    assert grade["contract"]["told"] == 1.0
    assert grade["contract"]["blind"] <= 0.75
    assert grade["adaptive"]


def test_a_mapping_is_invertible_and_of_its_seed():
    rows = torch.randn(3, 5, 7, dtype=torch.float64)
    basis = Mapped(3).expected(torch.eye(7, dtype=torch.float64))
    assert torch.allclose(rows @ basis, Mapped(3).expected(rows))
    assert float(torch.linalg.cond(basis)) < 4.1
    assert not torch.equal(basis, Mapped(4).expected(torch.eye(7, dtype=torch.float64)))


@pytest.mark.parametrize(
    ("clear", "told", "blind", "kept"),
    [
        (1.0, 1.0, 0.0, True),
        (1.0, 0.8, 0.0, False),  # it does not see through it
        (1.0, 1.0, 0.9, False),  # it needs not be told
        (0.5, 0.5, 0.1, True),
        (1.0, 1.0, None, True),
        (0.02, 0.02, 0.02, False),  # it reads nothing anywhere
    ],
)
def test_a_contract_is_kept_by_who_sees_through_and_gains_by_being_told(clear, told, blind, kept):
    assert Contract(clear, told, blind, floor=0.05).kept == kept


@pytest.mark.parametrize(("victims", "adaptive"), [(5, True), (4, False)])
def test_who_fails_behind_the_mapping_may_show_a_gain_on_this_defense(
    monkeypatch, victims, adaptive
):
    """Five victims of whom all are named by who is told and none by its twin: 1 in 32 by chance; four: 1 in 16."""
    tokens = torch.arange(1, victims + 1)[:, None].expand(-1, 3)
    truth = Truth(
        tokens=list(tokens), originals=[], private=[torch.ones(3, dtype=torch.bool)] * victims
    )
    wrong = Guess(tokens=torch.zeros(victims, 3, dtype=torch.long))
    monkeypatch.setattr(adaptive_contract, "behind_a_mapping", lambda *_: (wrong, wrong))
    monkeypatch.setattr(adaptive_contract, "roles_of", lambda *_: ("smashed",))
    grade = Grade("a", "K4", "tokens", 1.0, (1.0, 1.0), 0.0, {}, {}, hits=[(3, 3)] * victims)
    grade.positive_control = 1.0

    def attack(smashed, mechanism=None):
        raise NotImplementedError

    launch = Launch("a", attack, "K4")
    key = AnswerKey(truth, tuple(range(victims)))
    judge_adaptive(launch, frozenset({"mechanism"}), [grade], key, None, lambda *_: wrong)
    assert grade.adaptive is adaptive


def test_a_twin_is_told_nothing_of_the_defense():
    def attack(smashed, head, mechanism=None, queries=()):
        raise NotImplementedError

    def needs(smashed, mechanism):
        raise NotImplementedError

    twin = twin_of(Launch("a", attack, ("K4", "queries")))
    assert twin.asked == {"smashed", "head", "queries"}
    assert twin_of(Launch("a", needs, ("K4", "queries"))) is None
