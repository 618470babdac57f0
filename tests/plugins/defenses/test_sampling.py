"""What an attacker can draw from a mechanism is what the defense would send with the same randomness."""

from __future__ import annotations

import pytest
import torch

from vflair_defenses.dp_forward import DpForward
from vflair_defenses.dx_noise import DxNoise
from vflair_defenses.gaussian_noise import GaussianNoise
from vflair_defenses.laplace_noise import LaplaceNoise
from vflair_defenses.mid import Mid
from vflair_defenses.split_and_denoise import SplitAndDenoise
from vflair_defenses.text_obfuscator import TextObfuscator
from vflair_defenses.top_k import TopK


@pytest.mark.parametrize(
    "defense",
    [
        GaussianNoise(0.5, clip=1.0),
        LaplaceNoise(epsilon=20.0, clip=3.0),
        Mid(),
        Mid(decoder="linear", code=8),
        SplitAndDenoise(eta=50.0, clip=1.0, steps=1),
        TextObfuscator(epsilon=5.0, clusters=4),
        DpForward(epsilon=200.0, clip=2.0),
    ],
    ids=lambda defense: type(defense).__name__,
)
def test_a_sample_is_what_the_defense_sends_with_the_same_randomness(defense, defended, exchange):
    defended([defense])
    hidden = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        sent = defense.on_smashed(hidden, exchange(seed=7))
    mechanism = defense.mechanism()
    drawn = mechanism.sample(hidden, torch.Generator().manual_seed(7))
    assert torch.allclose(drawn, sent, atol=1e-6)
    other = mechanism.sample(hidden, torch.Generator().manual_seed(8))
    assert not torch.allclose(other, sent, atol=1e-3)


def test_the_coordinates_that_training_sends_are_drawn_alike(defended, exchange):
    defense = TopK(k=4, alpha=0.5)
    defended([defense])
    hidden = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(3))
    sent = defense.on_smashed(hidden, exchange(seed=7, phase="train"))
    mechanism = defense.mechanism()
    assert torch.equal(mechanism.sample(hidden, torch.Generator().manual_seed(7)), sent)
    assert not torch.equal(mechanism.sample(hidden, torch.Generator().manual_seed(8)), sent)
    assert torch.equal(
        TopK(k=4, alpha=0.0).mechanism().sample(hidden, None), mechanism.expected(hidden)
    )


def test_noise_before_the_head_is_drawn_there_too(defended, exchange):
    defense = DxNoise(eta=50.0)
    defended([defense])
    embeddings = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(3))
    sent = defense.on_embeddings(embeddings, exchange(seed=7))
    drawn = defense.mechanism().sample_embeddings(embeddings, torch.Generator().manual_seed(7))
    assert torch.equal(drawn, sent)
    assert not torch.equal(drawn, embeddings)


def test_a_row_of_a_scaled_sequence_is_scored_at_the_factor_that_fits_best():
    """By brute force over 10,001 factors between 0 and 1."""
    mechanism = DpForward(epsilon=200.0, clip=2.0).mechanism()
    observed, hidden = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0)).double()
    factors = torch.linspace(0, 1, 10_001).double()[:, None, None]
    gaps = (observed - factors * hidden).square().sum(-1).min(0).values
    expected = -gaps / (2 * mechanism.sigma**2)
    assert torch.allclose(mechanism.log_likelihood(observed, hidden), expected, rtol=1e-5)
