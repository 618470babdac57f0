"""Every kind of task, end to end across the cut: it learns, and is judged as the unsplit model is."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from vflair_core import Partition, plugin_manager, run, split
from vflair_core.config import experiment_from
from vflair_core.evaluation import evaluate, evaluate_party
from vflair_core.plugins import find
from vflair_core.pretraining import prepare_model
from vflair_core.reader import Reader
from vflair_core.reading import reading_of

KINDS = Path(__file__).with_name("kinds.py")
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}
LLAMA = {"model_type": "llama", **SIZES, "max_position_embeddings": 128}
BERT = {
    "model_type": "bert",
    **SIZES,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
T5 = {
    "model_type": "t5",
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 3,
    "num_heads": 2,
    "dropout_rate": 0.0,
}
LLAVA = {
    "model_type": "llava",
    "text_config": LLAMA,
    "vision_config": {
        "model_type": "clip_vision_model",
        **SIZES,
        "image_size": 16,
        "patch_size": 8,
        "projection_dim": 16,
    },
}
MODELS = {
    "pairs": BERT,
    "lengths": LLAMA,
    "passages": BERT,
    "colours": LLAMA,
    "choices": LLAMA,
    "sentences": LLAMA,
    "reversed": T5,
    "pictures": LLAVA,
}
HT, HBT = {"head": 1, "tail": 0}, {"head": 1, "tail": 1}


@pytest.fixture
def pm():
    return plugin_manager([KINDS], entry_point_group="vflair.none")


def experiment(task, cut, **changes):
    table = {
        "task": {"name": task},
        "model": {"config": MODELS[task], "vocab_size": 320},
        "partition": cut,
        "train": {"steps": 25, "batch_size": 8, "max_length": 40, "learning_rate": 0.01},
        "victims": {"count": 3, "bypass": 2},
        "isolation": "inline",
        "check_unsplit": True,
    }
    return experiment_from({**table, **changes})


@pytest.mark.parametrize("cut", [HT, HBT], ids=["HT", "HBT"])
@pytest.mark.parametrize("name", MODELS)
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
@pytest.mark.parametrize("name", MODELS)
def test_a_split_model_gets_exactly_the_unsplit_models_score(pm, name, cut):
    task = find(pm, "tasks", name).load()()
    model, tokenizer, processor = prepare_model(experiment(name, cut), task, lambda *_: None)
    for (
        weight
    ) in model.parameters():  # far from zero, so that answers differ from example to example
        weight.data.mul_(3)
    whole = copy.deepcopy(model)
    reader = Reader(tokenizer, reading_of(task, whole, processor=processor), 40)
    party, _ = split(model, Partition(**cut), tokenizer=tokenizer)
    party.task_kind, party.reading = task.kind, reading_of(task, party.model, processor=processor)
    theirs = evaluate(whole, task, reader, batch_size=5)
    assert evaluate_party(party, task, batch_size=5, max_length=40) == theirs
    assert torch.isfinite(torch.tensor(list(theirs.metrics.values()))).all()
