"""Small models with a tokenizer, and the calls in which a defense has to hold."""

from __future__ import annotations

import copy
import functools
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from vflair_core import Partition, split
from vflair_core.defenses.defense import Exchange
from vflair_core.tasks.tokenizer_training import train_tokenizer
from vflair_core.testing import tiny_model

PUBLIC = [
    "Public text that anyone may read, long enough for a few rows.",
    "The river runs past the old mill and the winter garden.",
    "A copper engine stood under the lamp beside a stone wall.",
    "Nobody knows which paper came first, or why it was written.",
]
VOCABULARY = 300


@functools.cache
def _tokenizer():
    return train_tokenizer(PUBLIC * 4, VOCABULARY)


@functools.cache
def _model(kind):
    sizes = {"vocab_size": VOCABULARY, "initializer_range": 0.3}
    if kind == "t5":
        options = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 3, "num_heads": 2}
        options |= {"vocab_size": VOCABULARY, "decoder_start_token_id": 0}
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            return AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **options)).eval()
    if kind == "bert":
        return tiny_model("bert", "classification", num_labels=2, **sizes)
    return tiny_model(kind, **sizes)


@pytest.fixture
def public():
    return list(PUBLIC)


@pytest.fixture
def defended():
    """A factory: defended(defenses, kind, head, tail) returns parties whose defenses are prepared, unless `prepare` is false."""

    def make(defenses=(), kind="gpt2", head=1, tail=1, task_kind=None, *, prepare=True):
        whole = copy.deepcopy(_model(kind))
        cut = Partition(head, tail)
        party, model_party = split(
            copy.deepcopy(whole), cut, defenses=list(defenses), tokenizer=_tokenizer(), seed=0
        )
        kinds = {"bert": "classification", "t5": "seq2seq"}
        party.defenses.task_kind = task_kind or kinds.get(kind, "causal-lm")
        for defense in defenses if prepare else ():
            defense.prepare(PUBLIC, party)
        return SimpleNamespace(whole=whole, data_party=party, model_party=model_party)

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
