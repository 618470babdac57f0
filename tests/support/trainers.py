"""The Trainer on tiny models: what it is given, and what it logs."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from vflair_core import split
from vflair_core.testing import tiny_batch, tiny_model

STEPS = 5


def rows_for(model, labels="tokens"):
    batch = tiny_batch(model, rows=12, labels=labels)
    return [{key: value[n] for key, value in batch.items()} for n in range(12)]


def trainer_of(
    model, folder, *callbacks, labels="tokens", rows=None, optimizers=(None, None), **options
):
    defaults = {
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    args = TrainingArguments(output_dir=str(folder), **{**defaults, **options})
    rows = rows_for(model, labels) if rows is None else rows
    return Trainer(
        model,
        args,
        train_dataset=rows,
        eval_dataset=rows[:4],
        callbacks=list(callbacks),
        optimizers=optimizers,
    )


def logged(trainer, **options):
    """Loss, gradient norm and learning rate of each step."""
    torch.manual_seed(5)
    trainer.train(**options)
    facts = ("loss", "grad_norm", "learning_rate")
    return [tuple(log[f] for f in facts) for log in trainer.state.log_history if "loss" in log]


def halves_of(kind, partition, task="causal-lm", **options):
    whole = tiny_model(kind, task)
    data_party, model_party = split(copy.deepcopy(whole), partition, wire=True, **options)
    if data_party.untied:
        whole.lm_head.weight = nn.Parameter(whole.lm_head.weight.detach().clone())
    return whole, data_party, model_party


def assert_equal_weights(whole, *parties):
    names = dict(whole.named_parameters())
    for party in parties:
        for name, weight in party.named_parameters():
            assert torch.equal(weight, names[name]), name
