"""Attacks that cluster, compare or learn: on gradients and states whose structure is known."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vflair_attacks.clusters import two_means
from vflair_attacks.direction import DirectionScoring
from vflair_attacks.label_completion import LabelCompletion
from vflair_attacks.label_reconstruction import BatchLabelReconstruction
from vflair_attacks.norm_scoring import NormScoring
from vflair_attacks.spectral import Spectral
from vflair_attacks.zero_rows import ZeroRows
from vflair_core import AttackError, Partition
from vflair_core.attacks.attack import launch
from vflair_core.experiments.grading.statistics import auc
from vflair_core.testing import tiny_model


def class_batches(count: int, labels: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(labels, (count,), generator=generator)
    ids = torch.randint(3, 64, (count, 6), generator=generator)
    return [
        {"input_ids": row[None], "labels": c[None]} for row, c in zip(ids, chosen, strict=True)
    ], chosen


@settings(deadline=None)
@given(st.lists(st.integers(-20, 20), min_size=2, max_size=8))
def test_two_means_is_the_best_cut_of_all(values):
    scores = torch.tensor(values, dtype=torch.float64)
    upper = two_means(scores)

    def cost(chosen):
        groups = [scores[chosen], scores[~chosen]]
        return sum(float((g - g.mean()).square().sum()) for g in groups if len(g))

    every = [torch.tensor(bits) for bits in itertools.product([False, True], repeat=len(values))]
    best = min(cost(bits) for bits in every if bits.any() and not bits.all())
    assert cost(upper) == pytest.approx(best, abs=1e-9)
    assert scores[upper].mean() >= scores[~upper].mean()


def test_the_norm_is_over_all_rows_and_padding_adds_nothing():
    gradient = torch.zeros(3, 4, 2)
    gradient[0, 0] = torch.tensor([3.0, 4.0])
    gradient[1, :2] = torch.tensor([6.0, 8.0])
    guess = NormScoring(positive=2, negative=1)(gradient)
    assert guess.scores.tolist() == pytest.approx([5.0, 200**0.5, 0.0])
    assert guess.labels.tolist() == [1, 2, 1]
    assert guess.positive == 2


def test_a_direction_needs_one_known_positive_and_names_what_is_known():
    gradient = torch.randn(4, 3, 5)
    with pytest.raises(AttackError, match=r"one example of class 1 .* known are \[0\]"):
        DirectionScoring()(gradient, {0: 0})


def test_one_known_positive_orders_all_others_in_hbt(crossing):
    batches, truth = class_batches(40, 2)
    seen = crossing(tiny_model("llama", "classification"), Partition(1, 1), batches)
    known = int((truth == 1).nonzero()[0])
    guess = launch(DirectionScoring(), {**seen, "known_labels": {known: 1}})
    others = torch.arange(40) != known
    assert auc(guess.scores[others], truth[others]) > 0.95


def test_with_several_known_classes_each_example_gets_the_nearest():
    axes = torch.eye(4)[[0, 1, 2, 0, 1, 2]] + 0.05 * torch.randn(6, 4)
    guess = DirectionScoring()(axes, {0: 0, 1: 1, 2: 2})
    assert guess.labels.tolist() == [0, 1, 2, 0, 1, 2]


def test_spectral_splits_two_clouds_and_known_labels_give_the_sign():
    torch.manual_seed(0)
    truth = torch.tensor([1, 0, 0, 1, 0, 0, 0, 1])
    states = torch.randn(8, 3, 6) + 8 * (2 * truth - 1)[:, None, None] * torch.eye(6)[2]
    lengths = torch.full((8,), 3)
    for on in ("hidden_grad", "returned", "smashed"):
        assert Spectral(on=on)(lengths, **{on: states}).labels.tolist() == truth.tolist()
    turned = Spectral()(lengths, hidden_grad=states, known_labels={0: 0})
    assert turned.labels.tolist() == (1 - truth).tolist()
    assert auc(turned.scores, truth) == 0.0


def test_spectral_says_what_did_not_cross():
    with pytest.raises(AttackError, match="works on hidden_grad, which did not cross"):
        Spectral()(torch.tensor([3]), returned=torch.randn(1, 3, 4))


@pytest.mark.parametrize("labels", [2, 6])
def test_learnt_labels_are_the_true_ones(crossing, labels):
    model = tiny_model("llama", "classification", num_labels=labels)
    batches, truth = class_batches(20, labels)
    seen = crossing(model, Partition(1, 2), batches)
    assert torch.equal(launch(BatchLabelReconstruction(), seen).labels, truth)


def test_the_assembled_gradient_equals_autograd_of_the_soft_cross_entropy(crossing):
    from vflair_attacks.tails import class_gradients

    model = tiny_model("bert", "classification", num_labels=3)
    batches, _ = class_batches(1, 3)
    seen = crossing(model, Partition(1, 1), batches)
    states, soft = seen["returned"][:1], torch.tensor([0.2, 0.5, 0.3])
    each, _ = class_gradients(seen["tail"], states)
    free = states.clone().requires_grad_()
    loss = -(soft * seen["tail"](free)[0].log_softmax(-1)).sum()
    (expected,) = torch.autograd.grad(loss, free)
    torch.testing.assert_close(
        (soft[:, None, None] * each).sum(0), expected[0], rtol=1e-4, atol=1e-6
    )


def test_reconstruction_refuses_language_models_by_name(crossing):
    ids = torch.randint(3, 60, (1, 5))
    seen = crossing(
        tiny_model("llama"), Partition(1, 1), [{"input_ids": ids, "labels": ids}], "causal-lm"
    )
    with pytest.raises(AttackError, match="use label-enumeration"):
        launch(BatchLabelReconstruction(), seen)


def test_completion_learns_a_linear_rule_from_few_labels():
    torch.manual_seed(0)
    truth = torch.arange(60) % 3
    states = torch.randn(60, 4, 8) + 6 * torch.eye(8)[truth][:, None]
    lengths = torch.full((60,), 4)
    known = {n: int(truth[n]) for n in range(9)}
    guess = LabelCompletion()(states, torch.zeros_like(states), lengths, known)
    assert float((guess.labels == truth).float().mean()) > 0.85
    blind = LabelCompletion(on="smashed")(states, torch.zeros_like(states), lengths, known)
    assert float((blind.labels == truth).float().mean()) < 0.5  # zeros say nothing


def test_completion_needs_two_known_classes():
    rows = torch.randn(4, 2, 3)
    with pytest.raises(AttackError, match=r"at least two classes; known are \[1\]"):
        LabelCompletion()(rows, rows, torch.full((4,), 2), {0: 1, 1: 1})


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_rows_of_zero_tell_the_prompt_from_the_answer_in_ht(crossing, kind):
    generator = torch.Generator().manual_seed(0)
    prompts, batches = (3, 5), []
    for prompt in prompts:
        ids = torch.randint(3, 60, (1, 9), generator=generator)
        labels = ids.clone()
        labels[:, :prompt] = -100
        batches.append({"input_ids": ids, "labels": labels})
    seen = crossing(tiny_model(kind), Partition(1, 0), batches, "causal-lm")
    guess = launch(ZeroRows(), seen)
    for row, prompt in zip(guess.answers, prompts, strict=True):
        assert row.tolist() == [False] * prompt + [True] * (9 - prompt)


def test_blocks_in_the_tail_hide_where_the_answer_begins_but_not_where_it_ends(crossing):
    ids = torch.randint(3, 60, (1, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :4] = labels[:, 7:] = -100
    seen = crossing(
        tiny_model("llama"), Partition(1, 2), [{"input_ids": ids, "labels": labels}], "causal-lm"
    )
    guess = launch(ZeroRows(), seen)
    assert guess.answers[0].tolist() == [False] + [True] * 6 + [False] * 2
