"""The audit against exact values, true claims and false ones; and the samplers behind the claims."""

from __future__ import annotations

import math
import random

import pytest
import torch

from vflair_core import DefenseError
from vflair_defenses.accounting import gaussian_sigma
from vflair_defenses.audit import _least, _most, audited_epsilon, epsilon_lower_bound
from vflair_defenses.d_chi import distance_noise, spread_of
from vflair_defenses.denoiser import TransformerDenoiser
from vflair_defenses.dp_forward import DpForward
from vflair_defenses.dx_noise import DxNoise
from vflair_defenses.gaussian_noise import GaussianNoise
from vflair_defenses.laplace_noise import LaplaceNoise
from vflair_defenses.quantisation import Quantisation
from vflair_defenses.split_and_denoise import SplitAndDenoise

FAR = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([-1.0, 0.0, 0.0])
TRIALS = 60_000
RATIO = 2 * gaussian_sigma(0.5, 0.1)


def denoiser(eta):
    defense = SplitAndDenoise(eta=eta, clip=1.0)
    defense.load_state({"facts": torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)})
    return defense


CLAIMS = {
    # At δ = 0.1 the claim is about the body of the distribution, which trials can see; at 1e-5, about a tail that they cannot.
    "gaussian": (lambda share: GaussianNoise(RATIO * share, delta=0.1, clip=1.0), 0.5, 0.1),
    "laplace": (lambda share: LaplaceNoise(1.0 / share, clip=1.0), 1.0, 0.0),
    "d_chi": (lambda share: denoiser(0.5 / share), 1.0, 0.0),  # η times the distance 2
}


@pytest.mark.parametrize("name", CLAIMS)
@pytest.mark.parametrize("seed", range(3))
def test_the_audit_never_exceeds_a_true_claim(name, seed, exchange):
    """False alarm once in 1,000 seeds, by construction."""
    make, epsilon, delta = CLAIMS[name]
    claim = make(1.0).guarantee(1).epsilon_per_release
    assert claim == pytest.approx(epsilon, rel=2e-3)
    found = audited_epsilon(make(1.0), *FAR, exchange(seed), trials=TRIALS, delta=delta)
    assert found <= claim
    assert found > 0.5 * claim  # and it is not blind


@pytest.mark.parametrize("name", CLAIMS)
def test_the_audit_rejects_noise_that_is_thirty_per_cent_too_small(name, exchange):
    make, epsilon, delta = CLAIMS[name]
    assert audited_epsilon(make(0.7), *FAR, exchange(), trials=TRIALS, delta=delta) > epsilon


def test_the_binomial_limits_equal_scipys():
    stats = pytest.importorskip("scipy.stats")
    for successes, trials in ((0, 50), (7, 50), (50, 50), (300, 1000)):
        low = stats.beta.ppf(0.01, successes, trials - successes + 1) if successes else 0.0
        high = (
            stats.beta.ppf(0.99, successes + 1, trials - successes) if successes < trials else 1.0
        )
        assert _least(successes, trials, 0.01) == pytest.approx(low, abs=1e-9)
        assert _most(successes, trials, 0.01) == pytest.approx(high, abs=1e-9)


def test_equal_inputs_have_no_lower_bound_but_zero():
    draw = torch.Generator().manual_seed(0)
    same = (torch.randn(5000, generator=draw) for _ in range(2))
    assert epsilon_lower_bound(*same) == 0.0


def test_a_defense_without_likelihood_cannot_be_audited(exchange):
    with pytest.raises(DefenseError, match="Quantisation has no mechanism with a likelihood"):
        audited_epsilon(Quantisation(), *FAR, exchange(), trials=10)


def test_d_chi_noise_has_gamma_lengths_and_uniform_directions(exchange, kolmogorov):
    """Kolmogorov-Smirnov, each with a false alarm once in 1,000 seeds."""
    width, eta = 8, 3.0
    noise = distance_noise(torch.zeros(20_000, width), eta, exchange())
    lengths = noise.norm(dim=1)
    assert (
        kolmogorov(lengths, lambda x: torch.special.gammainc(torch.tensor(8.0).double(), eta * x))
        < 1.95
    )
    # The squared first coordinate of a uniform direction is Beta(1/2, (D-1)/2); its sign is even.
    first = noise[:, 0] / lengths
    reference = torch.randn(200_000, width)
    reference = (reference[:, 0] / reference.norm(dim=1)).sort().values

    def empirical(x):
        return torch.searchsorted(reference, x.float()).double() / len(reference)

    assert kolmogorov(first, empirical) < 1.95 * math.sqrt(1.1)  # two samples: n and 10 n


def test_d_chi_noise_at_the_notes_numbers_has_length_7_68(exchange):
    lengths = distance_noise(torch.zeros(2000, 768), 100.0, exchange()).norm(dim=1)
    assert float(lengths.mean()) == pytest.approx(7.68, abs=0.03)


def test_no_two_rows_are_farther_apart_than_said():
    rows = torch.randn(60, 5)
    median, largest = spread_of(rows)
    every = torch.pdist(rows)
    assert largest >= float(every.max())
    assert median == pytest.approx(float(every.median()), rel=0.05)


def test_metric_guarantees_grow_with_distance_and_releases(defended):
    defense = DxNoise(eta=2.0)
    defended([defense])
    one, three = defense.guarantee(1), defense.guarantee(3)
    assert three.epsilon == pytest.approx(3 * one.epsilon)
    assert one.typical < one.epsilon
    assert "for units at the median distance" in str(three)


def test_dp_forward_clips_sequences_and_counts_messages(exchange):
    quiet = DpForward(epsilon=math.inf, clip=2.0)
    sent = quiet.on_smashed(torch.full((2, 4, 4), 1.0), exchange())
    assert torch.allclose(sent.flatten(1).norm(dim=1), torch.full((2,), 2.0))
    noisy = DpForward(epsilon=1.0, clip=2.0)
    noise = noisy.on_smashed(torch.zeros(1, 400, 100), exchange())
    assert float(noise.std()) == pytest.approx(3.731 * 4.0, rel=0.02)
    assert noisy.guarantee(64, 1).epsilon == pytest.approx(1.0, rel=1e-4)
    assert noisy.guarantee(64, 4).epsilon == noisy.guarantee(4).epsilon > 1.5


@pytest.mark.parametrize(("layers", "enough"), [(0, 300), (1, 60)])
def test_denoising_brings_returned_states_nearer_to_the_clean_ones(
    defended, public, layers, enough
):
    """On text that the denoiser has not seen; mean squared error of what the local tail gets."""
    draw = random.Random(0)
    words = " ".join(public).split()
    texts = [" ".join(draw.choices(words, k=12)) for _ in range(100)]

    def error(steps):
        defense = SplitAndDenoise(eta=20.0, steps=steps, layers=layers, hidden=64)
        parties = defended([defense])
        party = parties.data_party
        defense.prepare(texts[:80], party)
        batch = party.tokenizer(texts[80:], return_tensors="pt", padding=True)
        batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
        party.defenses.bypassed = True
        with torch.no_grad():
            clean = party.model(**batch, use_cache=False).logits
            party.defenses.bypassed = False
            noisy = party.model(**batch, use_cache=False).logits
        return float((clean - noisy).square().mean())

    assert error(enough) < 0.95 * error(0)


@pytest.mark.parametrize("causal", [True, False])
def test_a_transformer_corrects_a_position_by_what_it_may_see_and_never_by_padding(causal):
    denoiser = TransformerDenoiser(6, 8, 3, 2)
    torch.nn.init.normal_(denoiser.leave.weight)
    rows, mask = torch.randn(1, 5, 6), torch.tensor([[1, 1, 1, 1, 0]])
    bare = denoiser(rows[:, :4], None, causal=causal)
    assert torch.allclose(denoiser(rows, mask, causal=causal)[:, :4], bare, atol=1e-5)
    other = rows.clone()
    other[:, 3] += 1
    moved = (denoiser(other, mask, causal=causal) - denoiser(rows, mask, causal=causal)).abs()
    assert bool(moved[0, 3].max() > 1e-3)
    assert bool(moved[0, :3].max() > 1e-3) != causal


def test_a_transformer_is_restored_and_refuses_to_see_one_position_at_a_time(defended):
    trained, fresh = (SplitAndDenoise(layers=1, hidden=16, steps=2) for _ in range(2))
    parties = defended([trained])
    fresh.load_state(trained.state())
    restored = defended([fresh], prepare=False)
    ids = torch.arange(5, 13)[None]
    restored.data_party.defenses.begin_anew(fresh)  # as after `prepare`: the same noise
    first, second = (
        each.data_party.model(ids, labels=ids, use_cache=False).loss for each in (parties, restored)
    )
    assert torch.equal(first, second)
    ours, theirs = (each.state() for each in (trained, fresh))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(
        DefenseError, match="SplitAndDenoise does not support HBT × causal-lm × pre"
    ):
        restored.data_party.model.generate(ids, max_new_tokens=2, pad_token_id=0)


def test_the_logits_of_a_language_model_in_ht_are_not_denoised(defended):
    with pytest.raises(DefenseError, match="SplitAndDenoise does not support HT × causal-lm"):
        defended([SplitAndDenoise()], tail=0)
