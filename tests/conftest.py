"""What the tests share: one thread, one random state per test, and a model beside its two halves."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from vflair_core.parties.split import split
from vflair_core.partition.partition import Partition
from vflair_core.testing import tiny_batch
from vflair_core.testing import tiny_model as make_tiny_model

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_random_state():
    """Each test starts from the same global seed and leaves the random state as it found it."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        yield


@pytest.fixture
def tiny_model():
    return make_tiny_model("gpt2")


@pytest.fixture
def batch(tiny_model):
    return tiny_batch(tiny_model, padding="left", labels="tokens")


@pytest.fixture
def cut():
    """A factory: cut(kind, head, tail, ...) returns the `whole` model and its two halves."""

    def make(kind="gpt2", head=1, tail=1, *, task="causal-lm", disclose=(), model=None, **options):
        model = model if model is not None else make_tiny_model(kind, task)
        whole = copy.deepcopy(model)
        partition = Partition(head=head, tail=tail, disclose=disclose)
        data_party, model_party = split(model, partition, **options)
        return SimpleNamespace(whole=whole, data_party=data_party, model_party=model_party)

    return make
