"""The random streams of defenses: reproducible, apart from each other, and not to be guessed."""

from __future__ import annotations

import pytest
import torch

from vflair_core import Defense, DefenseError
from vflair_core.defenses.pipeline import Defenses


def noise(seed, index=0):
    each = [Defense(), Defense()]
    defenses = Defenses(each, "HBT", seed)
    return torch.randn(4000, generator=defenses.generator_of(each[index]))


def test_equal_seeds_give_equal_noise_and_each_defense_its_own():
    assert torch.equal(noise(3), noise(3))
    assert not torch.equal(noise(3), noise(3, index=1))
    assert not torch.equal(noise(None), noise(None))


def test_more_than_the_lower_32_bits_of_a_seed_count():
    """torch's manual_seed keeps 32 bits on the CPU: few enough to try them all."""
    small = torch.Generator().manual_seed(7)
    large = torch.Generator().manual_seed(7 + 2**32)
    assert torch.equal(torch.randn(9, generator=small), torch.randn(9, generator=large))
    assert not torch.equal(noise(7), noise(7 + 2**32))
    assert not torch.equal(noise(2**255), noise(2**255 + 1))


def test_the_noise_is_standard_normal():
    """4,000 draws: mean within 5, variance within 5 standard errors."""
    draws = noise(1)
    assert abs(float(draws.mean())) < 5 / 4000**0.5
    assert abs(float(draws.var()) - 1) < 5 * (2 / 4000) ** 0.5


def test_a_defense_that_covers_nothing_there_is_gets_a_suggestion():
    class Odd(Defense):
        covers = frozenset({"promt"})

    with pytest.raises(DefenseError, match="Did you mean 'prompt'"):
        Defenses([Odd()], "HBT", 0)
