"""The Gaussian curve against published numbers, direct integration and its laws."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vflair_defenses.accounting import gaussian_delta, gaussian_epsilon, gaussian_sigma


@pytest.mark.parametrize(("epsilon", "ratio"), [(1, 3.731), (8, 0.600), (50, 0.151)])
def test_sigma_equals_the_published_calibration_at_delta_1e_5(epsilon, ratio):
    """sigma / Delta of Balle & Wang's analytic mechanism, from the reference notes."""
    assert gaussian_sigma(epsilon, 1e-5) == pytest.approx(ratio, rel=1e-2)


def test_the_classical_formula_is_too_small_for_large_epsilon():
    classical = math.sqrt(2 * math.log(1.25 / 1e-5)) / 50
    assert gaussian_epsilon(1 / classical, 1e-5) > 50


@pytest.mark.parametrize(("epsilon", "mu"), [(0.5, 0.3), (1.0, 1.0), (4.0, 2.5)])
def test_delta_equals_the_hockey_stick_divergence_integrated_by_brute_force(epsilon, mu):
    x = torch.linspace(-20, 20 + mu, 400_001, dtype=torch.float64)
    p = (-0.5 * (x - mu) ** 2).exp() / math.sqrt(2 * math.pi)
    q = (-0.5 * x**2).exp() / math.sqrt(2 * math.pi)
    divergence = float(torch.trapezoid((p - math.exp(epsilon) * q).clamp_min(0), x))
    assert gaussian_delta(epsilon, mu) == pytest.approx(divergence, rel=1e-5)


@given(mu=st.floats(0.01, 500), delta=st.floats(1e-9, 0.1))
def test_epsilon_is_the_smallest_that_keeps_delta(mu, delta):
    epsilon = gaussian_epsilon(mu, delta)
    assert gaussian_delta(epsilon, mu) <= delta * (1 + 1e-6)
    if epsilon > 1e-3:
        assert gaussian_delta(epsilon * 0.99, mu) > delta


def test_bad_budgets_are_refused():
    with pytest.raises(ValueError, match="delta must lie in"):
        gaussian_epsilon(1.0, 0.0)
    with pytest.raises(ValueError, match="epsilon must be > 0"):
        gaussian_sigma(0.0, 1e-5)
