"""Small models with a tokenizer, and the calls in which a defense has to hold."""

from __future__ import annotations

import math

import pytest
import torch

from vflair_core.defenses.defense import Exchange
from vflair_core.testing.calls import PUBLIC, parties_of


@pytest.fixture
def public():
    return list(PUBLIC)


@pytest.fixture
def defended():
    """A factory: defended(defenses, kind, head, tail) returns parties whose defenses are prepared, unless `prepare` is false."""

    def make(defenses=(), kind="gpt2", head=1, tail=1, task_kind=None, *, prepare=True):
        return parties_of(kind, head, tail, list(defenses), task_kind=task_kind, prepare=prepare)

    return make


@pytest.fixture
def exchange():
    """A factory of exchanges with a seeded stream."""

    def make(seed=0, **facts):
        generator = torch.Generator().manual_seed(seed)
        return Exchange(1, 0, facts.pop("phase", "eval"), generator=generator, **facts)

    return make


@pytest.fixture
def kolmogorov():
    """Largest distance of the empirical distribution to `cdf`, times √n; above 1.95 with probability 0.001."""

    def statistic(sample, cdf):
        x = sample.double().sort().values
        n = len(x)
        expected, ranks = cdf(x), torch.arange(1, n + 1, dtype=torch.float64) / n
        gap = torch.maximum((ranks - expected).abs(), (ranks - 1 / n - expected).abs()).max()
        return float(gap) * math.sqrt(n)

    return statistic
