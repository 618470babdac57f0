"""Defenses that perturb rows: distributions as stated, rounding and dropping as by hand."""

from __future__ import annotations

import math

import pytest
import torch

from vflair_core import DefenseError
from vflair_core.testing import tiny_batch
from vflair_defenses.gaussian_noise import GaussianNoise
from vflair_defenses.laplace_noise import LaplaceNoise
from vflair_defenses.permutation import Permutation, SecretOrder
from vflair_defenses.quantisation import Quantisation
from vflair_defenses.sparsification import Sparsification
from vflair_defenses.top_k import TopK


def laplace_cdf(scale):
    return lambda x: torch.where(x < 0, 0.5 * (x / scale).exp(), 1 - 0.5 * (-x / scale).exp())


def test_laplace_noise_has_the_distribution_it_states(exchange, kolmogorov):
    """Kolmogorov-Smirnov with a false alarm once in 1,000 seeds; a scale 5 % off is found."""
    noise = LaplaceNoise(epsilon=4.0, clip=3.0).on_smashed(torch.zeros(1, 4000, 50), exchange())
    assert kolmogorov(noise.flatten(), laplace_cdf(2 * 3.0 / 4.0)) < 1.95
    assert kolmogorov(noise.flatten(), laplace_cdf(1.05 * 2 * 3.0 / 4.0)) > 1.95


def test_laplace_clips_in_l1_and_composes_by_addition(exchange):
    rows = torch.tensor([[[3.0, -4.0], [0.5, 0.25]]])
    clipped = LaplaceNoise(epsilon=math.inf, clip=3.5).on_smashed(rows, exchange())
    assert torch.allclose(clipped, torch.tensor([[[1.5, -2.0], [0.5, 0.25]]]))
    promised = LaplaceNoise(epsilon=4.0, clip=1.0).guarantee(10, 2, 3)
    assert (promised.epsilon, promised.delta, promised.releases) == (40.0, 0.0, 10)
    both = LaplaceNoise(epsilon=4.0, clip=1.0, gradient_epsilon=2.0, gradient_clip=1.0)
    assert both.guarantee(10, 2, 3).epsilon == 46.0


@pytest.mark.parametrize("kind", [GaussianNoise, LaplaceNoise])
def test_noise_on_gradients_without_a_clip_is_refused(kind):
    name = "gradient_multiplier" if kind is GaussianNoise else "gradient_epsilon"
    with pytest.raises(DefenseError, match="without a sensitivity: gradient_clip is 0"):
        kind(**{name: 1.0})


def test_gradients_are_clipped_by_example_and_counted_in_the_guarantee(exchange):
    quiet = GaussianNoise(gradient_multiplier=1e-9, gradient_clip=2.0)
    gradient = torch.stack([torch.full((2, 2), 3.0), torch.full((2, 2), 0.5)])  # norms 6 and 1
    sent = quiet.on_gradient(gradient, exchange())
    assert torch.allclose(sent[0], torch.full((2, 2), 1.0), atol=1e-6)
    assert torch.allclose(sent[1], gradient[1], atol=1e-6)
    both = GaussianNoise(1.0, clip=1.0, gradient_multiplier=0.5, gradient_clip=1.0)
    # 4 rows with μ = 2 and 1 gradient with μ = 4 weigh as much as 8 rows.
    assert both.guarantee(4, 1, 1).epsilon == pytest.approx(
        GaussianNoise(1.0, clip=1.0).guarantee(8).epsilon
    )
    assert {"labels", "gradients"} <= both.covers


def test_sparsification_keeps_the_largest_of_each_row(exchange):
    rows = torch.tensor([[[1.0, -5.0, 3.0, 0.0], [0.1, 0.2, -0.3, 0.4]]])
    kept = Sparsification(rate=0.5).on_smashed(rows, exchange())
    expected = torch.tensor([[[0.0, -5.0, 3.0, 0.0], [0.0, 0.0, -0.3, 0.4]]])
    assert torch.equal(kept, expected)
    assert Sparsification(rate=0.5).bytes_per_row(768) == min(384 * (4 + 2), 768 * 4)


def test_top_k_draws_as_many_outsiders_as_the_binomial_says(exchange):
    """20,000 rows: the mean number of outsiders is within 5 standard errors, false alarm below 1e-6."""
    rows = torch.arange(1.0, 11.0).expand(1, 20_000, 10)
    kept = TopK(k=4, alpha=0.25).on_smashed(rows, exchange(phase="train"))
    assert ((kept != 0).sum(-1) == 4).all()
    outsiders = (kept[..., :6] != 0).sum(-1).float().mean()
    assert float(outsiders) == pytest.approx(4 * 0.25, abs=5 * math.sqrt(4 * 0.25 * 0.75 / 20_000))
    each = (kept[..., :6] != 0).float().mean((0, 1))
    assert torch.allclose(each, torch.full((6,), 1 / 6), atol=0.015)
    in_evaluation = TopK(k=4, alpha=0.25).on_smashed(rows, exchange(phase="decode"))
    assert torch.equal(in_evaluation, rows * (rows > 6))


def test_rounding_equals_the_definition_and_lets_gradients_pass(exchange):
    rows = torch.tensor([[[7.0, -3.4, 0.6]]], requires_grad=True)
    sent = Quantisation(bits=4).on_smashed(rows, exchange())  # 7 levels up, step 1
    assert torch.allclose(sent, torch.tensor([[[7.0, -3.0, 1.0]]]))
    sent.sum().backward()
    assert torch.equal(rows.grad, torch.ones_like(rows))
    with pytest.raises(ValueError, match="2 to 16"):
        Quantisation(bits=1)


def test_a_permuted_model_computes_what_it_did_and_sorted_rows_give_the_tokens_away(defended):
    parties = defended([Permutation(seed=3)])
    batch = tiny_batch(parties.whole)
    ours, expected = parties.data_party.model(**batch).logits, parties.whole(**batch).logits
    assert torch.allclose(ours, expected, atol=1e-5)
    rows = parties.data_party.smashed(input_ids=batch["input_ids"]).flatten(0, 1)  # (N, D)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(8))
    scores = torch.stack([SecretOrder().log_likelihood(rows[:, order], row) for row in rows])
    assert torch.equal(scores.argmax(0), torch.arange(len(rows)))
