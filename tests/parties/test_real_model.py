"""A real language model is split exactly: its losses, its gradients, its words."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from support.real_model import PACKAGE, REAL
from vflair_core import FineTuning, Lora, Partition, Train, locate_checkpoint, split, tune

pytestmark = REAL
CUTS = [Partition(2, 2), Partition(2, 0)]
PROMPTS = [
    "The flat on the third floor is shown by Kofi Barros: make a date at kofi@juniper.example.",
    "Please call Wanda Meyer before noon.",
]


@pytest.fixture(scope="module")
def real():
    folder = locate_checkpoint(**PACKAGE)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), tokenizer


@pytest.fixture
def batch(real):
    encoded = real[1](PROMPTS, return_tensors="pt", padding=True, padding_side="right")
    labels = encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, -100)
    return {**encoded, "labels": labels}


@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: cut.kind)
def test_losses_logits_and_words_equal_those_of_the_whole_model(real, batch, cut):
    model, tokenizer = real
    data_party, _ = split(copy.deepcopy(model), cut, tokenizer=tokenizer)
    with torch.no_grad():
        ours, theirs = (m(**batch, use_cache=False) for m in (data_party.model, model))
    assert torch.equal(ours.loss, theirs.loss)
    assert torch.equal(ours.logits, theirs.logits)
    prompts = {name: batch[name][:1] for name in ("input_ids", "attention_mask")}
    for options in ({}, {"num_beams": 2}):
        said = [
            m.generate(**prompts, max_new_tokens=5, do_sample=False, **options)
            for m in (data_party.model, model)
        ]
        assert torch.equal(*said), options


@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: cut.kind)
def test_steps_of_low_rank_adapters_equal_those_of_the_whole_model(real, batch, cut):
    model, whole = real[0], copy.deepcopy(real[0])
    data_party, model_party = split(copy.deepcopy(model), cut)
    tune(whole, adapters=Lora(r=4), seed=0, slices=data_party.slices)
    for party in (data_party, model_party):
        tune(party, adapters=Lora(r=4), seed=0)
    training = FineTuning(data_party, Train(learning_rate=1e-3, clip=0.0))
    optimizer = torch.optim.AdamW(
        [p for p in whole.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0
    )
    whole.train()
    for _ in range(3):
        loss = whole(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert training.step(batch) == float(loss.detach())
