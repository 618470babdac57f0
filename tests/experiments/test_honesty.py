"""A mechanism that is not what the defense does is found out; a right one hardly ever is."""

from __future__ import annotations

import math

import pytest
import torch
from attrs import define

import vflair_attacks
import vflair_defenses
from support.cheating_attacks import OnVictims
from support.paths import SAMPLE_PLUGIN
from support.small_models import LLAMA
from vflair_core import Defense, Mechanism, Partition, plugin_manager, run, split, train_tokenizer
from vflair_core.attacks.adaptive import rebuilt_mechanism
from vflair_core.errors import DefenseError
from vflair_core.experiments.config import experiment_from
from vflair_core.experiments.honesty import (
    FALSE_ALARMS,
    chance_of_a_match,
    company_check,
    mechanism_check,
)
from vflair_core.testing import tiny_model
from vflair_defenses.dx_noise import DxNoise
from vflair_defenses.gaussian_noise import GaussianNoise
from vflair_defenses.laplace_noise import LaplaceNoise
from vflair_defenses.mid import Mid
from vflair_defenses.permutation import Permutation
from vflair_defenses.quantisation import Quantisation
from vflair_defenses.top_k import TopK

PUBLIC = [
    f"Public text number {n} that anyone may read, {n * 7} words or so long." for n in range(16)
]


class Negated(Mechanism):
    def expected(self, hidden):
        return -hidden


class Silent(Mechanism):
    """Says that nothing is done."""


class Other:
    """Has a mechanism's look, and is none."""

    in_nats = False

    def expected(self, hidden):
        return hidden


@define(slots=False)
class Liar(Defense):
    """Adds noise and says that it does something else."""

    said: str = "negated"
    covers = frozenset({"prompt"})

    def on_smashed(self, smashed, exchange):
        return smashed + torch.randn(smashed.shape, generator=exchange.generator)

    def mechanism(self):
        return {"negated": Negated(), "nothing": Silent(), "something else": Other()}[self.said]


def party_with(defenses, kind="llama"):
    tokenizer = train_tokenizer(PUBLIC, 300)
    model = tiny_model(kind, vocab_size=300, initializer_range=0.3)
    party, _ = split(model, Partition(1, 1), defenses=defenses, tokenizer=tokenizer, seed=0)
    party.prepare(PUBLIC)
    return party


TRUE = [
    GaussianNoise(noise_multiplier=0.5),
    LaplaceNoise(epsilon=50.0),
    Quantisation(bits=3),
    TopK(k=4),
    Permutation(),
    DxNoise(eta=20.0),
    Mid(start=0.5),
]


@pytest.mark.parametrize("defense", TRUE, ids=lambda d: type(d).__name__)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_shipped_defenses_say_is_what_they_do(defense, kind):
    found = mechanism_check(party_with([defense], kind), PUBLIC)
    assert found["matches"], found


@pytest.mark.parametrize("defense", TRUE, ids=lambda d: type(d).__name__)
@pytest.mark.parametrize("training", [True, False])
def test_shipped_defenses_do_in_company_what_they_do_alone(defense, training):
    found = company_check(party_with([defense]), PUBLIC, training=training)
    assert found["agrees"], found


def test_a_defense_that_acts_on_victims_only_is_found_out():
    assert not company_check(party_with([OnVictims()]), PUBLIC)["agrees"]


def test_two_defenses_one_after_the_other_are_told_as_one():
    party = party_with([GaussianNoise(noise_multiplier=0.2), Quantisation(bits=4)])
    assert mechanism_check(party, PUBLIC)["matches"]


@pytest.mark.parametrize("said", ["negated", "nothing"])
def test_a_defense_that_says_something_else_is_found_out(said):
    assert not mechanism_check(party_with([Liar(said)]), PUBLIC)["matches"]


def test_what_is_no_mechanism_is_refused_by_name_wherever_it_would_be_asked():
    with pytest.raises(DefenseError, match=r"told of Other .* Derive Other from Mechanism"):
        mechanism_check(party_with([Liar("something else")]), PUBLIC)
    specs = [{"target": f"{__name__}:Liar", "options": {"said": "something else"}}]
    with pytest.raises(DefenseError, match="told of Other"):
        rebuilt_mechanism(specs, "mechanism", None)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_noise_of_another_scale_is_found_out(factor):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(200, 16, generator=generator)
    sent, said = (hidden + s * torch.randn(200, 16, generator=generator) for s in (1.0, factor))
    assert chance_of_a_match(sent, said, generator) <= FALSE_ALARMS


def test_a_right_mechanism_is_accused_no_more_often_than_it_says():
    """p is uniform: of 300 pairs of equal noise no more than 5 % and 4 standard errors are at most .05."""
    generator = torch.Generator().manual_seed(0)
    accused = 0
    for _ in range(300):
        hidden = torch.randn(40, 8, generator=generator)
        sent, said = (hidden + torch.randn(40, 8, generator=generator) for _ in range(2))
        accused += chance_of_a_match(sent, said, generator) <= 0.05
    assert accused / 300 <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / 300)


def test_nothing_is_compared_where_nothing_is_said():
    assert mechanism_check(party_with([]), PUBLIC) is None


@pytest.fixture
def pm():
    manager = plugin_manager([SAMPLE_PLUGIN], entry_point_group="vflair.none")
    manager.register(vflair_attacks)
    manager.register(vflair_defenses)
    return manager


def result_of(pm, defense, attacks, **options):
    table = {
        "task": {"name": "words"},
        "model": {"config": LLAMA, "vocab_size": 300},
        "partition": {"head": 1, "tail": 1},
        "train": {"steps": 1, "batch_size": 4, "max_length": 12},
        "victims": {"count": 6, "max_length": 12, "bypass": 2},
        "isolation": "inline",
        "defenses": [{"name": defense, "options": options}],
        "attacks": attacks,
    }
    return run(experiment_from(table), plugins=pm).numbers["defended"]


def test_an_attack_that_asks_nothing_of_use_is_not_adaptive(pm):
    """A search asks for the row that is expected; noise on embeddings has no other answer than no defense."""
    search = {"name": "vocabulary-search", "knowledge": "K4", "options": {"prior": 0.0}}
    learned = {"name": "inverter", "knowledge": "K4", "options": {"network": "mlp", "steps": 20}}
    arm = result_of(pm, "dx-noise", [search, learned], eta=200.0)
    assert arm["mechanism"]["matches"]
    assert [grade["adaptive"] for grade in arm["attacks"]] == [False, True]


def test_an_attack_that_takes_the_mechanism_and_idles_is_not_adaptive(pm):
    idle = {"name": "takes-and-idles", "knowledge": "K4"}
    search = {"name": "vocabulary-search", "knowledge": "K4", "options": {"prior": 0.0}}
    arm = result_of(pm, "gaussian-noise", [idle, search], noise_multiplier=0.01)
    assert [grade["adaptive"] for grade in arm["attacks"]] == [False, True]
    assert arm["evaluated"]["tokens"]
