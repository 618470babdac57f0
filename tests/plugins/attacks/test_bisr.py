"""BiSR stage by stage: what each adds, where it must not touch anything, and when it cannot run."""

from __future__ import annotations

import pytest
import torch

from vflair_attacks.bisr import BiSR
from vflair_attacks.learning import Inverter
from vflair_attacks.noise_experts import Experts
from vflair_core import Partition
from vflair_core.attacks.attack import launch
from vflair_core.defenses.mechanism import Mechanism
from vflair_core.testing import crossed, numbers_as_texts, tiny_model, tiny_tokenizer

VOCABULARY, LENGTH, PROMPT = 200, 8, 3
SMALL = {"scales": (0.0,), "network": "mlp", "hidden": 64, "steps": 60}
LEARNED = BiSR(**SMALL, gradient_steps=0, forward_steps=0)
WITH_GRADIENT = BiSR(**SMALL, forward_steps=0)
WITH_FORWARD = BiSR(**SMALL, gradient_steps=0)


def victims(kind="llama", partition=None, *, train=True):
    rows = torch.randint(3, VOCABULARY, (5, LENGTH))
    public = torch.randint(3, VOCABULARY, (300, LENGTH))
    labels = rows.clone()
    labels[:, :PROMPT] = -100
    size = {"vocab_size": VOCABULARY, "hidden_size": 32, "initializer_range": 0.1}
    knowledge = crossed(
        tiny_model(kind, **size), partition or Partition(1, 2), rows, labels=labels if train else None
    )  # fmt: skip
    texts = {"tokenizer": tiny_tokenizer(VOCABULARY), "public_texts": numbers_as_texts(public)}
    return rows, {**knowledge, **texts, "task_kind": "causal-lm"}


def found(attack, knowledge):
    return launch(attack, {**knowledge, "generator": torch.Generator().manual_seed(0)})


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("partition", [Partition(1, 1), Partition(1, 2)])
def test_the_gradient_stage_finds_all_labelled_tokens_and_leaves_all_others(kind, partition):
    rows, knowledge = victims(kind, partition)
    learned, better = found(LEARNED, knowledge), found(WITH_GRADIENT, knowledge)
    assert better.budget["labelled_positions"] == rows[:, PROMPT:].numel()
    assert torch.equal(better.tokens[:, PROMPT:], rows[:, PROMPT:])
    assert torch.equal(better.tokens[:, :PROMPT], learned.tokens[:, :PROMPT])
    assert not torch.equal(learned.tokens[:, PROMPT:], rows[:, PROMPT:])


def test_the_forward_stage_improves_on_the_learned_inverter():
    rows, knowledge = victims()
    before = (found(LEARNED, knowledge).tokens == rows).float().mean()
    after = (found(WITH_FORWARD, knowledge).tokens == rows).float().mean()
    assert after > before


def test_together_they_read_the_text():
    rows, knowledge = victims("gpt2")
    assert torch.equal(found(BiSR(**SMALL), knowledge).tokens, rows)


@pytest.mark.parametrize("case", ["inference", "HT", "classification"])
def test_without_gradients_of_hidden_states_at_a_causal_tail_there_is_no_gradient_stage(case):
    partition = Partition(1, 0) if case == "HT" else Partition(1, 1)
    _, knowledge = victims(partition=partition, train=case != "inference")
    if case == "classification":
        knowledge["task_kind"] = case
    guess = found(WITH_GRADIENT, knowledge)
    assert guess.budget["labelled_positions"] == 0
    assert torch.equal(guess.tokens, found(LEARNED, knowledge).tokens)


class Turned(Mechanism):
    def __init__(self, matrix):
        self.matrix = matrix

    def expected(self, hidden):
        return hidden @ self.matrix


def test_a_known_mechanism_is_inside_training_and_the_forward_stage():
    rows, knowledge = victims("gpt2", train=False)
    mechanism = Turned(torch.linalg.qr(torch.randn(32, 32))[0])
    knowledge["releases"] = mechanism.expected(knowledge["releases"])
    blind = found(BiSR(**SMALL), knowledge)
    adaptive = found(BiSR(**SMALL), {**knowledge, "mechanism": mechanism})
    assert (blind.tokens == rows).float().mean() < 0.1
    assert (adaptive.tokens == rows).float().mean() > 0.9


def test_experts_for_noise_read_noisy_embeddings_better_than_one_that_saw_none():
    rows, knowledge = victims("gpt2", train=False)
    head, table = knowledge["head"], knowledge["head"].vectors()
    noise = table.square().mean().sqrt() * torch.randn(*rows.shape, table.shape[1])
    knowledge["releases"] = head(inputs_embeds=table[rows] + noise)[None]
    options = {**SMALL, "steps": 150, "gradient_steps": 0, "forward_steps": 0}
    one, three = BiSR(**options), BiSR(**{**options, "scales": (0.0, 0.5, 1.0)})
    right = [
        float((found(attack, knowledge).tokens == rows).float().mean()) for attack in (one, three)
    ]
    assert right[1] > right[0] + 0.05


def test_a_gate_weighs_experts_by_real_rows_only():
    network = Experts([Inverter("mlp", 8, 8, 20) for _ in range(3)], 8).eval()
    hidden, lengths = torch.randn(2, 5, 8), torch.tensor([5, 2])
    weights = network.weights(hidden, lengths)
    assert torch.allclose(weights.sum(-1), torch.ones(2))
    hidden[1, 2:] = 100.0
    assert torch.allclose(network.weights(hidden, lengths), weights)
