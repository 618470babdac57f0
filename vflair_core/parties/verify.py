"""The gate for a model type: a small random model, split against unsplit, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from vflair_core.errors import PartitionError, alternatives
from vflair_core.parties.split import split
from vflair_core.partition.module_tree import names_by_weight
from vflair_core.partition.partition import Partition
from vflair_core.tasks.kinds import KINDS, TaskKind

CONTENTS = 3  # texts tried
BATCH, LENGTH = 2, 9
TASKS: tuple[TaskKind, ...] = ("causal-lm", "classification", "question-answering", "seq2seq")


@frozen
class Verification:
    """What `verify` found; `exact` is the word that counts."""

    model: str
    partition: Partition
    logits_equal: bool
    loss_equal: bool
    tokens_equal: bool | None  # None for models that do not generate
    # Largest difference relative to the largest entry of the gradient, or to 1 % of the model's largest.
    worst_gradient: float

    @property
    def exact(self) -> bool:
        """Logits, loss and tokens equal bitwise, gradients but for the order in which they are summed."""
        forward = self.logits_equal and self.loss_equal and self.tokens_equal is not False
        return forward and self.worst_gradient <= 1e-5


def verify(config: Any, partition: Partition, *, task: TaskKind = "causal-lm") -> Verification:
    """Build a random model from `config` (make it small), cut a copy, and compare the two.

    Args:
        config: A transformers config.
        partition: The cut.
        task: causal-lm, classification, question-answering or seq2seq.

    Raises:
        PartitionError: This type cannot be cut this way.
    """
    import transformers

    if task not in TASKS:
        raise PartitionError(f"Cannot verify task {task!r}.{alternatives(task, TASKS)}")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        whole = getattr(transformers, KINDS[task].auto).from_config(config)
        party, model_party = split(copy.deepcopy(whole), partition, wire=True)
        texts = [_batch(config, task) for _ in range(CONTENTS)]
        forwards = [compare(whole, party, model_party, batch) for batch in texts]
        tokens = tokens_equal(whole, party, texts[0]) if KINDS[task].generates else None
    return Verification(
        config.model_type,
        partition,
        all(logits for logits, _, _ in forwards),
        all(loss for _, loss, _ in forwards),
        tokens,
        max(worst for _, _, worst in forwards),
    )


def _batch(config: Any, task: str) -> dict[str, Tensor]:
    ids = torch.randint(3, config.get_text_config().vocab_size, (BATCH, LENGTH))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    match task:
        case "classification":
            return {**batch, "labels": torch.randint(config.num_labels, (BATCH,))}
        case "question-answering":
            places = torch.randint(LENGTH, (2, BATCH))
            return {**batch, "start_positions": places[0], "end_positions": places[1]}
        case _:
            return {**batch, "labels": ids}


def compare(
    whole: Any, party: Any, model_party: Any, batch: Mapping[str, Tensor]
) -> tuple[bool, bool, float]:
    """Take one training pass of a model and of its two halves: are logits equal, is the loss, how far are gradients apart?

    Gradients are compared by weight, relative to the largest entry of the weight's, or to 1 % of the model's largest.
    """
    results = []
    for model in (whole, party.model):
        torch.manual_seed(1)
        model.train()
        outputs = model(**batch)
        outputs.loss.backward()
        results.append(outputs)
    ours = dict(party.named_parameters()) | dict(model_party.named_parameters())
    worst = 0.0
    tied = set(party.untied) and _tied_twins(whole) | set(party.untied)
    top = max(float(p.grad.abs().max()) for p in whole.parameters() if p.grad is not None)
    for name, parameter in whole.named_parameters():
        mine = ours[name].grad
        if name not in tied and parameter.grad is not None:
            scale = max(float(parameter.grad.abs().max()), top / 100, 1e-30)
            difference = float((parameter.grad - mine).abs().max()) / scale
            worst = max(worst, difference)
    for owner in (whole, party.model, model_party.model):
        owner.zero_grad(set_to_none=True)
    names = [name for name in ("logits", "start_logits", "end_logits") if name in results[0]]
    logits = all(torch.equal(results[0][name], results[1][name]) for name in names)
    return logits, torch.equal(results[0].loss, results[1].loss), worst


def _tied_twins(whole: Any) -> set[str]:
    """Weights that the cut untied: their gradient is now in two parts, at two owners."""
    return {name for group in names_by_weight(whole) if len(group) > 1 for name in group}


def tokens_equal(whole: Any, party: Any, batch: Mapping[str, Tensor]) -> bool:
    """Let a model and its halves write six tokens to the prompts of a batch, and compare them."""
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    sequences = [model.eval().generate(**inputs, **options) for model in (whole, party.model)]
    return torch.equal(*sequences)
