"""The adaptive contract: an attack that says it uses `mechanism` goes through any invertible mapping it knows.

An attack that cannot do this measures the defense's secrecy. And without the mapping it must find nothing, or the
mapping hid nothing.
"""

from __future__ import annotations

import pytest
import torch

from vflair_attacks import vflair_attacks
from vflair_attacks.beam_clean import BeamClean
from vflair_attacks.bisr import BiSR
from vflair_attacks.coordinate_search import CoordinateSearch
from vflair_attacks.inverter import LearnedInverter
from vflair_attacks.linear_inverter import LinearInverter
from vflair_attacks.model_completion import JointInversion
from vflair_attacks.patch_inversion import PatchInversion
from vflair_attacks.replaced_words import ReplacementInversion
from vflair_attacks.vmi import ModelInversion
from vflair_attacks.vocabulary_search import VocabularySearch
from vflair_attacks.wbi import WhiteBoxInversion
from vflair_core import Defense, Partition
from vflair_core.attacks.attack import launch, wants
from vflair_core.defenses.mechanism import Mechanism
from vflair_core.offers import load_target
from vflair_core.testing import (
    crossed,
    numbers_as_texts,
    tiny_batch,
    tiny_model,
    tiny_tokenizer,
)
from vflair_defenses import vflair_defenses

VOCABULARY, WIDTH, EXAMPLES, LENGTH = 300, 32, 12, 10

ADAPTIVE = {
    "vmi": ModelInversion(steps=300, restarts=2),
    "patch-inversion": PatchInversion(steps=100, restarts=2),
    "wbi": WhiteBoxInversion(),
    "linear-inverter": LinearInverter(),
    "inverter": LearnedInverter(network="mlp", steps=500),
    "bisr": BiSR(scales=(0.0,), network="mlp"),
    "vocabulary-search": VocabularySearch(),
    "coordinate-search": CoordinateSearch(),
    "beam-clean": BeamClean(),
    "joint-inversion": JointInversion(),
    "replacement-inversion": ReplacementInversion(),
}


class Mixing(Defense):
    """Multiplies each row by a random invertible matrix, the same for all."""

    def __init__(self) -> None:
        stream = torch.Generator().manual_seed(7)
        self.matrix = torch.randn(WIDTH, WIDTH, generator=stream) / WIDTH**0.5

    def on_smashed(self, smashed, exchange):
        return smashed @ self.matrix

    def mechanism(self):
        return Mixed(self.matrix)


class Mixed(Mechanism):
    def __init__(self, matrix):
        self.matrix = matrix

    def expected(self, hidden):
        return hidden @ self.matrix


@pytest.fixture(scope="module")
def victims():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        rows = torch.randint(3, VOCABULARY, (EXAMPLES, LENGTH))
        public = torch.randint(3, VOCABULARY, (600, LENGTH))
    model = tiny_model("gpt2", vocab_size=VOCABULARY, hidden_size=WIDTH, initializer_range=0.02)
    knowledge = crossed(model, Partition(2, 1), rows, defenses=[Mixing()])
    texts = {"tokenizer": tiny_tokenizer(VOCABULARY), "public_texts": numbers_as_texts(public)}
    texts["embeddings"] = model.get_input_embeddings().weight.detach()
    return rows, {**knowledge, **texts, "task_kind": "causal-lm"}


def accuracy(attack, knowledge, rows) -> float:
    guess = launch(attack, {**knowledge, "generator": torch.Generator().manual_seed(0)})
    return float((guess.tokens == rows).float().mean())


@pytest.mark.parametrize("attack", ADAPTIVE.values(), ids=ADAPTIVE)
def test_a_known_mapping_hides_nothing_and_an_unknown_one_all(attack, victims):
    rows, knowledge = victims
    assert accuracy(attack, {**knowledge, "mechanism": Mixing().mechanism()}, rows) >= 0.99
    assert accuracy(attack, knowledge, rows) <= 0.05


def test_every_attack_through_the_head_that_asks_for_the_mechanism_is_under_the_contract():
    asking = set()
    for name, target in vflair_attacks().items():
        needed, optional = wants(load_target(target)())
        if {"mechanism", "head", "releases"} <= {*needed, *optional}:
            asking.add(name)
    assert asking == set(ADAPTIVE)


@pytest.mark.parametrize("name", ["mid", "adversarial-training"])
def test_an_attack_that_climbs_can_climb_along_a_learned_map(name):
    """A mechanism under no_grad ended vmi at K4 with an error of autograd's."""
    defense = load_target(vflair_defenses()[name])()
    model = tiny_model("llama", vocab_size=300)
    rows = list(tiny_batch(model, length=4)["input_ids"])
    knowledge = crossed(model, Partition(1, 1), rows, defenses=[defense], knowledge="K4")
    guess = launch(ModelInversion(restarts=1, steps=3), knowledge)
    assert guess.tokens.shape == (3, 4)
