"""Anchors 9 and 10 of the reference, and label attacks at sizes that a unit test does not reach."""

from __future__ import annotations

import pytest
import torch

from vflair_attacks.direction import DirectionScoring
from vflair_attacks.gradient_sign import GradientSign
from vflair_attacks.label_enumeration import LabelEnumeration
from vflair_attacks.norm_scoring import NormScoring
from vflair_attacks.spectral import Spectral
from vflair_core import Partition, Transcript, split
from vflair_core.attacks.attack import launch
from vflair_core.attacks.halves import halves
from vflair_core.attacks.observables import Observables
from vflair_core.experiments.grading.scores import dcs
from vflair_core.experiments.grading.statistics import auc
from vflair_core.testing import tiny_model
from vflair_core.training.fine_tuning import FineTuning, Train

pytestmark = pytest.mark.slow
PARTITION = Partition(1, 1)
COUNT, RARE = 128, 0.15
NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}


def imbalanced(seed: int):
    """Texts in which one of two words stands; the rare class is the one with word 5."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(COUNT, generator=generator) < RARE).long()
    ids = torch.randint(10, 64, (COUNT, 8), generator=generator)
    ids[:, 3] = torch.where(labels == 1, 5, 6)
    return ids, labels


def trained(steps: int, seed: int):
    """The parties and the joined model after some steps of training, and the data."""
    model = tiny_model("llama", "classification", seed=seed, initializer_range=0.1)
    ids, labels = imbalanced(seed)
    party, model_party = split(model, PARTITION)
    rounds = FineTuning(party, Train(learning_rate=3e-3, clip=0.0))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(COUNT, (16,), generator=generator)
        rounds.step({"input_ids": ids[rows], "labels": labels[rows]})
    whole = tiny_model("llama", "classification", seed=seed)
    whole.load_state_dict({**party.model.state_dict(), **model_party.model.state_dict()})
    return party, whole, ids, labels


def messages_after(steps: int, seed: int):
    """What crosses of each text alone after some steps of training."""
    party, whole, ids, labels = trained(steps, seed)
    _, tail = halves(whole, PARTITION)
    with party.channel.tap(Transcript()) as transcript:
        for row, label in zip(ids, labels, strict=True):
            batch = {"input_ids": row[None], "labels": label[None]}
            party.model(**batch, use_cache=False).loss.backward()
    seen = Observables(transcript.messages, victims=COUNT)
    return {**seen, "tail": tail, "partition": PARTITION, "task_kind": "classification"}, labels


def test_enumeration_finds_every_label_at_every_stage_and_directions_do_at_the_start():
    """Reference: 1.000 each, and raw norm AUC from .01 to 1.00 with seed and stage of training.

    Here the tail has a block, so that after training the gradient's direction depends on the text too; which part of
    the tail costs what is measured below.
    """
    norms = []
    for steps in (0, 60):
        for seed in range(3):
            knowledge, labels = messages_after(steps, seed)
            assert torch.equal(launch(LabelEnumeration(), knowledge).labels, labels)
            norms.append(auc(launch(NormScoring(), knowledge).scores, labels))
            if steps:
                continue
            positive = int(labels.nonzero()[0])
            others = torch.arange(COUNT) != positive
            known = {**knowledge, "known_labels": {positive: 1}}
            assert auc(launch(DirectionScoring(), known).scores[others], labels[others]) == 1.0
            assert auc(launch(Spectral(), known).scores, labels) == 1.0
            assert auc(launch(Spectral(), knowledge).scores, labels) == 1.0
    assert min(norms) < 0.4
    assert max(norms) > 0.9


def gradients_before(module: str, steps: int, seed: int):
    """What would cross if the tail began at `module`, which no Partition can say: each text's gradient, (N, T, D)."""
    _, whole, ids, labels = trained(steps, seed)
    seen = []

    def watch(_module, inputs):
        inputs[0].retain_grad()
        seen.append(inputs[0])

    handle = whole.eval().get_submodule(module).register_forward_pre_hook(watch)
    logits = whole(input_ids=ids, use_cache=False).logits
    handle.remove()
    torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    return seen[0].grad, labels


def direction_and_spectral(gradients, labels) -> tuple[float, float]:
    """AUC of both, one example of each class known, which gives the singular vector its sign."""
    known = {int((labels == label).nonzero()[0]): label for label in (0, 1)}
    others = torch.ones(COUNT, dtype=torch.bool)
    others[list(known)] = False
    lengths = torch.full((COUNT,), gradients.shape[1])
    directions = DirectionScoring()(gradients, known).scores
    spectral = Spectral()(lengths, hidden_grad=gradients, known_labels=known).scores
    return auc(directions[others], labels[others]), auc(spectral[others], labels[others])


@pytest.mark.parametrize("steps", [0, 20, 60, 120])
def test_behind_the_norm_directions_find_every_label_at_every_stage(steps):
    """By hand: there each gradient is (p₁ - y)(w₁ - w₀), one line, on which the sign is the label."""
    for seed in range(5):
        gradients, labels = gradients_before("score", steps, seed)
        assert direction_and_spectral(gradients, labels) == (1.0, 1.0)


def test_before_the_norm_directions_find_every_label_early_and_lose_them_late():
    """Anchor 9 with a tail of norm and head: 1.000 untrained and after 20 steps; not after 120, where it says 1.000.

    RMSNorm's Jacobian takes from each gradient the part along its own state. Training turns the states to the direction
    of the label (mean |cosine| .20 untrained, .97 after 120 steps), so what is left of that direction points each its
    own way: DS .91, spectral .95 with its true sign, means of 5 seeds. Who has the tail undoes it (enumeration).
    """
    for seed in range(5):
        for steps in (0, 20):
            gradients, labels = gradients_before("model.norm", steps, seed)
            assert direction_and_spectral(gradients, labels) == (1.0, 1.0)
    late = [direction_and_spectral(*gradients_before("model.norm", 120, seed)) for seed in range(5)]
    directions, _ = torch.tensor(late).mean(0)
    assert 0.8 < directions < 0.98


def test_causal_labels_are_enumerated_backwards_through_two_blocks_sixty_of_sixty():
    torch.manual_seed(0)
    model = tiny_model("gpt2", vocab_size=300, **NO_DROPOUT)
    partition = Partition(1, 2)
    _, tail = halves(model, partition)
    party, _ = split(model, partition)
    rows = torch.randint(3, 300, (4, 16))
    with party.channel.tap(Transcript()) as transcript:
        for row in rows:
            party.model(input_ids=row[None], labels=row[None], use_cache=False).loss.backward()
    knowledge = {"tail": tail, "partition": partition, "task_kind": "causal-lm"}
    seen = {**Observables(transcript.messages, victims=4), **knowledge}
    guess = launch(LabelEnumeration(), seen)
    assert int((guess.tokens[:, 1:] == rows[:, 1:]).sum()) == 60


def test_the_sign_of_the_logits_gradient_is_the_label_at_a_real_vocabulary():
    """1,000 rows at V = 50,257, with label smoothing and with all but the largest 5 % set to zero."""
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(1, 1001, 50257, generator=generator)).requires_grad_()
    labels = torch.randint(50257, (1000,), generator=generator)
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], labels, label_smoothing=0.1)
    (gradient,) = torch.autograd.grad(loss, logits)
    for seen in (gradient, sparse(gradient)):
        guess = GradientSign()(seen, torch.tensor([1001]), Partition(1, 0), "causal-lm")
        assert torch.equal(guess.tokens[0, 1:], labels)


def sparse(gradient):
    keep = gradient.shape[-1] // 20
    places = gradient.abs().topk(keep, dim=-1).indices
    return torch.zeros_like(gradient).scatter(-1, places, gradient.gather(-1, places))


@pytest.mark.parametrize(
    ("main", "attack", "best", "published"),
    [(0.510, 0.167, 0.560, 0.890), (0.56, 1.0, 0.56, 0.586), (0.0, 0.0, 0.55, 0.720)],
)
def test_dcs_equals_the_published_arithmetic(main, attack, best, published):
    assert dcs(attack, main, best) == pytest.approx(published, abs=5e-4)
