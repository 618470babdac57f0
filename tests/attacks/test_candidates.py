"""Candidates for the next token, tried in one pass, give what each gives in a text of its own."""

from __future__ import annotations

import pytest
import torch

from vflair_core import Partition
from vflair_core.attacks.halves import halves
from vflair_core.testing import tiny_model

GEMMA = {"head_dim": 8, "num_key_value_heads": 1, "intermediate_size": 32}
# Families whose candidates can be one sequence, and those of which each must be read by itself.
ONE_SEQUENCE = {
    "gpt2": {},
    "llama": {},
    "qwen2": {},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16},
    "gpt_neox": {"intermediate_size": 32},
    "gemma": GEMMA,
    "falcon": {"alibi": False},
    "gptj": {"rotary_dim": 4},
}
ONE_BY_ONE = {
    "falcon": {"alibi": True},
    "bloom": {"n_layer": 4, "n_head": 2},
    "mpt": {"d_model": 16, "n_layers": 4, "n_heads": 2, "max_seq_len": 64},
    "mistral": {"intermediate_size": 32, "num_key_value_heads": 1, "sliding_window": 4},
    "gemma2": {**GEMMA, "sliding_window": 4},
    "gpt_neo": {
        "num_layers": 4, "num_heads": 2, "attention_types": [[["global", "local"], 2]], "window_size": 4,
    },
    "mamba": {},
    "rwkv": {},
}  # fmt: skip


def head_of(kind, options):
    return halves(tiny_model(kind, **options), Partition(2, 1))[0]


def alone(head, ids, candidates):
    """The row of each candidate in a text of its own, without a cache: (B, C, D)."""
    each = candidates.unbind(1)
    return torch.stack([head(torch.cat([ids, c[:, None]], dim=1))[:, -1] for c in each], dim=1)


def read(head, ids):
    prefix = head.cache()
    for position in range(ids.shape[1]):
        head.append(ids[:, position : position + 1], prefix)
    return prefix


@pytest.fixture
def texts():
    torch.manual_seed(0)
    return torch.randint(3, 60, (2, 30)), torch.randint(3, 60, (2, 12))


FAMILIES = [(kind, options, True) for kind, options in ONE_SEQUENCE.items()]
FAMILIES += [(kind, options, False) for kind, options in ONE_BY_ONE.items()]


@pytest.mark.parametrize(
    ("kind", "options", "together"), FAMILIES, ids=[f"{kind}-{t}" for kind, _, t in FAMILIES]
)
@torch.no_grad()
def test_every_candidate_gives_what_it_gives_alone_whatever_the_head_can_do(
    kind, options, together, texts
):
    head, (ids, candidates) = head_of(kind, options), texts
    for length in (0, 1, 7, 20):
        prefix = read(head, ids[:, :length])
        expected = alone(head, ids[:, :length], candidates)
        assert torch.allclose(head.try_tokens(candidates, prefix), expected, atol=1e-5, rtol=1e-4)
        following = head.append(ids[:, length : length + 1], prefix)
        whole = head(ids[:, : length + 1])
        assert torch.allclose(following[:, 0], whole[:, -1], atol=1e-5, rtol=1e-4)
        assert (prefix.states is not None) == together


@pytest.mark.parametrize("kind", ["mistral", "gemma2"])
@torch.no_grad()
def test_a_window_is_found_by_trying_and_candidates_go_in_as_many_passes_as_it_takes(kind, texts):
    head, (ids, _) = head_of(kind, {**ONE_BY_ONE[kind], "sliding_window": 20}), texts
    candidates = torch.arange(3, 60).expand(2, -1)
    for length in (0, 9, 15, 16, 25):  # one sequence is proven for 16 positions, not for 32
        prefix = read(head, ids[:, :length])
        assert prefix.states is not None
        expected = alone(head, ids[:, :length], candidates)
        assert torch.allclose(head.try_tokens(candidates, prefix), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("kind", "times"), [("llama", 1), ("bloom", 21)])
@torch.no_grad()
def test_the_beginning_is_read_again_only_where_it_must_be(kind, times, texts, monkeypatch):
    head, (ids, candidates) = head_of(kind, (ONE_SEQUENCE | ONE_BY_ONE)[kind]), texts
    prefix = read(head, ids[:, :20])
    head.try_tokens(candidates, prefix)  # proves what one sequence can do
    seen, smashed = [], head._party.smashed

    def counted(**inputs):
        seen.append(inputs["input_ids"].numel())
        return smashed(**inputs)

    monkeypatch.setattr(head._party, "smashed", counted)
    head.try_tokens(candidates, prefix)
    assert sum(seen) == candidates.numel() * times


@pytest.mark.parametrize("kind", ["llama", "bloom"])
@torch.no_grad()
def test_some_texts_can_be_gone_on_with_and_the_others_stay(kind, texts):
    head, (ids, candidates) = head_of(kind, (ONE_SEQUENCE | ONE_BY_ONE)[kind]), texts
    prefix = read(head, ids[:, :7])
    before = head.try_tokens(candidates, prefix)
    second = prefix.of(torch.tensor([1]))
    assert torch.allclose(head.try_tokens(candidates[1:], second), before[1:], atol=1e-5)
    head.append(ids[1:, 7:8], second)
    assert (prefix.length, second.length) == (7, 8)
    assert torch.equal(head.try_tokens(candidates, prefix), before)
    prefix.batch_select_indices(torch.tensor([1, 1, 0]))
    again = head.try_tokens(candidates[[1, 1, 0]], prefix)
    assert torch.allclose(again, before[[1, 1, 0]], atol=1e-5)


@torch.no_grad()
def test_no_more_candidates_are_in_one_sequence_than_their_mask_may_hold(texts, monkeypatch):
    head, (ids, candidates) = head_of("llama", {}), texts
    expected = alone(head, ids[:, :7], candidates)
    widths, in_one = [], head._candidates._in_one_sequence

    def noted(tokens, states, past):
        widths.append(tokens.shape[1])
        return in_one(tokens, states, past)

    monkeypatch.setattr("vflair_core.attacks.candidates.WIDEST", 5)
    prefix = read(head, ids[:, :7])
    monkeypatch.setattr(type(head._candidates), "_in_one_sequence", lambda _, *given: noted(*given))
    assert torch.allclose(head.try_tokens(candidates, prefix), expected, atol=1e-5, rtol=1e-4)
    assert widths[-3:] == [5, 5, 2]  # before them, the proof that one sequence is right
