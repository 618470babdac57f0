"""Parameter names are the threat model: what is asked for is matched with what is granted."""

from __future__ import annotations

import itertools

import pytest
import torch
from attrs import frozen

from vflair_core import AttackError, Guess
from vflair_core.attacks.attack import check, launch, wants
from vflair_core.attacks.grants import GRANTS
from vflair_core.attacks.knowledge import OBSERVABLES, PRESETS, VOCABULARY, granted


def guess() -> Guess:
    return Guess(labels=torch.tensor([1]))


def test_presets_nest_and_use_only_names_of_the_vocabulary():
    names = list(PRESETS.values())
    assert all(smaller < larger for smaller, larger in itertools.pairwise(names))
    assert set().union(*names) <= set(VOCABULARY)


def test_every_name_of_the_vocabulary_can_be_granted_by_itself():
    for name in VOCABULARY:
        assert name in granted([name])


def test_an_attack_gets_what_it_names_and_no_more():
    def attack(smashed, mask, head=None) -> Guess:
        assert (smashed, mask, head) == ("H", "M", None)
        return guess()

    launch(attack, {"smashed": "H", "mask": "M", "embeddings": "E"})


def test_a_parameter_with_a_default_is_given_when_granted():
    seen = []

    def attack(smashed, head=None) -> Guess:
        seen.append(head)
        return guess()

    launch(attack, {"smashed": "H", "head": "W"})
    assert seen == ["W"]


def test_asking_for_more_than_granted_names_both():
    def attack(smashed, current_head) -> Guess:
        raise AssertionError

    with pytest.raises(
        AttackError, match="attack needs current_head, which it is not granted"
    ) as error:
        check(attack, granted("K1"))
    assert "embeddings" in str(error.value)


def test_what_no_preset_grants_is_asked_for_by_name():
    def attack(updates, head) -> Guess:
        raise AssertionError

    with pytest.raises(
        AttackError, match=r"no preset holds updates: name it, as in \['K4', 'updates'\]"
    ):
        check(attack, granted("K4"))
    check(attack, granted(["K2", "updates"]))


@pytest.mark.parametrize(("name", "meant"), [("smashd", "smashed"), ("embedings", "embeddings")])
def test_a_misspelt_knowledge_argument_is_caught_with_a_suggestion(name, meant):
    namespace = {}
    exec(f"def attack({name}): ...", namespace)  # a parameter name cannot be parametrized otherwise
    with pytest.raises(AttackError, match=f"Did you mean '{meant}'"):
        check(namespace["attack"], granted("K4"))


def test_a_misspelt_grant_is_caught_with_a_suggestion():
    with pytest.raises(
        AttackError, match=r"no knowledge called 'pretraned_head'.*'pretrained_head'"
    ):
        granted("pretraned_head")


def test_an_attack_may_not_hide_its_needs_behind_star_arguments():
    def attack(**everything) -> Guess:
        raise AssertionError

    with pytest.raises(AttackError, match="must name what it needs"):
        check(attack, granted("K4"))


def test_fields_are_options_and_arguments_are_needs():
    @frozen
    class Attack:
        width: int = 3

        def __call__(self, smashed, head=None) -> Guess:
            return guess()

    assert wants(Attack()) == (("smashed",), ("head",))


def test_anything_but_a_guess_is_refused():
    with pytest.raises(AttackError, match="must return a Guess"):
        launch(lambda smashed: smashed, {"smashed": torch.zeros(1)})
    with pytest.raises(AttackError, match="must hold tokens, labels, scores, answers or members"):
        Guess()
    with pytest.raises(AttackError, match="whole numbers of shape"):
        Guess(tokens=torch.zeros(2, 3))


def test_every_word_of_the_vocabulary_is_either_seen_or_a_row_of_the_table_of_grants():
    seen = set(OBSERVABLES) - {"updates"}  # no message holds an update
    assert set(GRANTS) == set(VOCABULARY) - seen
