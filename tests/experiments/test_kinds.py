"""Every kind of task, end to end across the cut: it learns, and is judged as the unsplit model is."""

from __future__ import annotations

import copy

import pytest
import torch

import vflair_defenses
from support.paths import TASK_KINDS
from support.small_models import OF_KINDS
from vflair_core import Partition, plugin_manager, run, split
from vflair_core.errors import ExperimentError
from vflair_core.experiments.base_model import prepare_model
from vflair_core.experiments.config import experiment_from
from vflair_core.experiments.explain import explain
from vflair_core.offers import find
from vflair_core.tasks.preprocessor import Preprocessor
from vflair_core.tasks.tokenization import input_format_of
from vflair_core.training.evaluation import evaluate, evaluate_party

ANSWERED = ("colours", "pictures")  # kinds whose rows go on with an answer
HT, HBT = {"head": 1, "tail": 0}, {"head": 1, "tail": 1}


@pytest.fixture
def pm():
    return plugin_manager([TASK_KINDS], entry_point_group="vflair.none")


def experiment(task, cut, **changes):
    table = {
        "task": {"name": task},
        "model": {"config": OF_KINDS[task], "vocab_size": 320},
        "partition": cut,
        "train": {"steps": 25, "batch_size": 8, "max_length": 40, "learning_rate": 0.01},
        "victims": {"count": 3, "bypass": 2},
        "isolation": "inline",
        "check_unsplit": True,
    }
    return experiment_from({**table, **changes})


@pytest.mark.parametrize("cut", [HT, HBT], ids=["HT", "HBT"])
@pytest.mark.parametrize("name", OF_KINDS)
def test_training_across_the_cut_takes_the_unsplit_steps_and_lowers_the_loss(pm, name, cut):
    attacks = [{"name": "shapes", "knowledge": "K0"}]
    arm = run(experiment(name, cut, attacks=attacks), plugins=pm).numbers["undefended"]
    if (
        name == "reversed" and cut == HBT
    ):  # encoder states and biases get gradients from both parties
        assert arm["unsplit_losses_differ_by"] < 1e-4
    else:
        assert arm["unsplit_losses_equal"]
    before, after = (arm["evaluations"][n]["metrics"]["loss"] for n in (0, -1))
    assert after <= 0.9 * before


@pytest.mark.parametrize("cut", [HT, HBT], ids=["HT", "HBT"])
@pytest.mark.parametrize("name", OF_KINDS)
def test_a_split_model_gets_exactly_the_unsplit_models_score(pm, name, cut):
    task = find(pm, "tasks", name).load()()
    model, tokenizer, processor = prepare_model(experiment(name, cut), task, lambda *_: None)
    for (
        weight
    ) in model.parameters():  # far from zero, so that answers differ from example to example
        weight.data.mul_(3)
    whole = copy.deepcopy(model)
    reader = Preprocessor(tokenizer, input_format_of(task, whole, processor=processor), 40)
    party, _ = split(model, Partition(**cut), tokenizer=tokenizer)
    party.take_up(task, processor=processor)
    theirs = evaluate(whole, task, reader, batch_size=5)
    assert evaluate_party(party, task, batch_size=5, max_length=40) == theirs
    assert torch.isfinite(torch.tensor(list(theirs.metrics.values()))).all()


@pytest.mark.parametrize("name", ["passages", "reversed", "pictures"])
def test_public_pretraining_teaches_the_weights_that_the_task_uses(pm, name):
    told = []
    task = find(pm, "tasks", name).load()()
    options = {"pretrain": {"steps": 25, "length": 16, "learning_rate": 0.01}}
    model, *_ = prepare_model(
        experiment(name, HBT, **options), task, lambda phase, *_: told.append(phase)
    )
    losses = [float(phase.split("loss ")[1]) for phase in told]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    fresh, *_ = prepare_model(experiment(name, HBT), task, lambda *_: None)
    moved = model.get_input_embeddings().weight != fresh.get_input_embeddings().weight
    assert moved.any()


@pytest.mark.parametrize("name", ["passages", "reversed", "pictures"])
def test_all_that_can_be_granted_reaches_an_attack_of_every_kind_in_the_worker(pm, name):
    everything = ["K4", "queries", "in_domain", "few_labelled"]
    attacks = [{"name": "everything", "knowledge": everything}]
    changes = {"train": {"steps": 1, "max_length": 40}, "isolation": "process"}
    arm = run(
        experiment(name, HBT, attacks=attacks, check_unsplit=False, **changes), plugins=pm
    ).numbers["undefended"]
    grade, *responses = arm["attacks"]
    assert [row["target"] for row in responses] == ["response"] * (name in ANSWERED)
    assert grade["budget"]["head"] < 1e-5  # the granted head makes what was seen
    # In front of a picture's text stand the picture's own positions, which no text has.
    assert grade["budget"]["compared"] == (name != "pictures")
    assert grade["budget"]["queries"] == 60
    assert grade["budget"]["labelled"] == 16


def test_packed_training_across_the_cut_takes_the_unsplit_steps(pm):
    train = {"steps": 6, "batch_size": 8, "max_length": 40, "packing": True}
    arm = run(experiment("sentences", HBT, train=train), plugins=pm).numbers["undefended"]
    assert arm["unsplit_losses_equal"]


def test_what_cannot_be_packed_is_refused(pm):
    with pytest.raises(ExperimentError, match="seq2seq cannot learn from"):
        run(experiment("reversed", HBT, train={"packing": True}), plugins=pm)


@pytest.mark.parametrize("name", ["passages", "reversed", "pictures"])
def test_explain_sends_public_text_in_the_form_of_every_kind(pm, name):
    facts = explain(experiment(name, HT), pm)
    assert {"smashed", "returned", "hidden_grad"} <= {row["role"] for row in facts["crossings"]}


def test_names_that_a_text_defense_takes_out_are_not_recovered_and_with_it_bypassed_they_are(pm):
    changes = {
        "partition": {"head": 0, "tail": 1},  # the embeddings themselves cross
        "attacks": [{"name": "nearest", "knowledge": "K1"}],
        "defenses": [{"name": "blank"}],
        "train": {"steps": 1, "learning_rate": 1e-6, "max_length": 40},
        "check_unsplit": False,
    }
    numbers = run(experiment("colours", HBT, **changes), plugins=pm).numbers
    plain, defended = (numbers[arm]["attacks"][0] for arm in ("undefended", "defended"))
    assert plain["attack_performance"] == plain["details"]["planted_strings_recovered"] == 1.0
    assert defended["details"]["planted_strings_recovered"] == 0.0
    assert defended["positive_control"] == 1.0


def test_questions_about_replaced_words_are_answered_in_the_words_before(pm):
    """At this ε words are drawn almost evenly: an answer in the words that were sent would never be right."""
    pm.register(vflair_defenses)
    defended = experiment(
        "passages", HBT,
        attacks=[{"name": "shapes", "knowledge": "K0"}],
        defenses=[{"name": "santext", "options": {"epsilon": 1e-3}}],
        train={"steps": 60, "batch_size": 8, "max_length": 60, "learning_rate": 0.01},
        check_unsplit=False,
    )  # fmt: skip
    arm = run(defended, plugins=pm).numbers["defended"]
    assert arm["evaluations"][-1]["metrics"]["of_answers"] >= 0.2
