"""A cut model writes, token by token, what the whole one writes; its cache lives in two halves."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from transformers.cache_utils import DynamicCache

from vflair_core.communication.cache_kinds import cache_argument
from vflair_core.errors import PartitionError
from vflair_core.testing import tiny_batch

KINDS = ["gpt2", "llama", "qwen2"]
CUTS = [(1, 1), (0, 2), (1, 0), (0, 0)]
STRATEGIES = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True, "temperature": 0.9},
}


def write(model, prompt, **options):
    torch.manual_seed(7)
    return model.generate(
        **prompt, max_new_tokens=6, return_dict_in_generate=True, output_logits=True, **options
    )


def assert_same_writing(ours, expected):
    assert torch.equal(ours.sequences, expected.sequences)
    assert len(ours.logits) == len(expected.logits)
    for step, (found, wanted) in enumerate(zip(ours.logits, expected.logits, strict=True)):
        assert torch.equal(found, wanted), f"logits of token {step}"


def remote_caches(parties):
    return parties.model_party.sessions[parties.data_party.connection.session].caches


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("head", "tail"), CUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_generated_tokens_and_logits_equal_those_of_the_whole_model(
    cut, kind, head, tail, strategy
):
    parties = cut(kind, head, tail, wire=True)
    for padding in ("left", None):
        prompt = tiny_batch(parties.whole, padding=padding)
        expected = write(parties.whole, prompt, **STRATEGIES[strategy])
        assert_same_writing(
            write(parties.data_party.model, prompt, **STRATEGIES[strategy]), expected
        )


@pytest.mark.parametrize("kind", KINDS)
def test_generation_over_clones_and_over_bytes_is_the_same(cut, kind):
    prompt = tiny_batch(cut(kind).whole)
    clones, wire = (write(cut(kind, wire=wire).data_party.model, prompt) for wire in (False, True))
    assert_same_writing(clones, wire)


@pytest.mark.parametrize("kind", KINDS)
def test_generation_without_a_cache_equals_the_whole_model(cut, kind):
    parties = cut(kind)
    prompt = tiny_batch(parties.whole, padding="left")
    expected = write(parties.whole, prompt, use_cache=False, do_sample=False)
    assert_same_writing(
        write(parties.data_party.model, prompt, use_cache=False, do_sample=False), expected
    )


def test_training_after_generation_and_generation_after_training_stay_equal(cut):
    parties = cut("llama")
    batch = tiny_batch(parties.whole, labels="tokens")
    prompt = {key: batch[key] for key in ("input_ids", "attention_mask")}
    models = (parties.whole, parties.data_party.model)
    owners = ([parties.whole], [parties.data_party, parties.model_party])
    writings = []
    for model, parts in zip(models, owners, strict=True):
        write(model, prompt)
        model.train()
        model(**batch).loss.backward()
        with torch.no_grad():
            for weight in (p for part in parts for p in part.parameters()):
                weight -= 0.1 * weight.grad
        model.eval()
        writings.append(write(model, prompt))
    assert torch.equal(writings[0].sequences, writings[1].sequences)


def read(model, ids, cache):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=True, **{cache_argument(model): cache}).logits


@pytest.mark.parametrize(("head", "tail"), [(1, 1), (0, 1), (1, 0)])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize(
    ("deed", "rows"),
    [
        (lambda cache: cache.crop(-3), 3),
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), 3),
        (lambda cache: cache.batch_repeat_interleave(2), 6),
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), 2),
    ],
    ids=["crop", "reorder", "repeat", "select"],
)
def test_what_is_done_to_the_cache_reaches_the_model_party(cut, kind, head, tail, deed, rows):
    parties = cut(kind, head, tail)
    ids = tiny_batch(parties.whole, length=9)["input_ids"]
    outputs = []
    for model in (parties.whole, parties.data_party.model):
        cache = DynamicCache(config=parties.whole.config)
        read(model, ids, cache)
        deed(cache)
        more = torch.arange(3, 3 + 2 * rows).view(rows, 2)
        outputs.append(
            (read(model, more, cache), cache.get_seq_length(), read(model, more[:, :1], cache))
        )
    (expected, length, then), (ours, our_length, our_then) = outputs
    assert torch.equal(ours, expected)
    assert our_length == length
    assert torch.equal(our_then, then)


def test_crop_refuses_what_the_whole_cache_refuses(cut):
    parties = cut("llama", 0, 1)
    ids = tiny_batch(parties.whole)["input_ids"]
    cache = DynamicCache(config=parties.whole.config)
    read(parties.data_party.model, ids, cache)
    with pytest.raises(ValueError, match="positive value"):
        cache.crop(3)
    assert cache.get_seq_length() == ids.shape[1]


def test_a_copied_prefix_cache_can_be_continued_several_times(cut):
    parties = cut("llama")
    ids = tiny_batch(parties.whole)["input_ids"]
    continued = []
    for model in (parties.whole, parties.data_party.model):
        prefix = DynamicCache(config=parties.whole.config)
        read(model, ids, prefix)
        branches = []
        for word in (5, 9, 5):
            branch = copy.deepcopy(prefix)
            branches.append(read(model, torch.full((len(ids), 1), word), branch))
        continued.append(branches)
    for ours, expected in zip(continued[1], continued[0], strict=True):
        assert torch.equal(ours, expected)


def test_the_model_party_drops_its_half_when_the_cache_is_gone(cut):
    parties = cut("llama")
    model, ids = parties.data_party.model, tiny_batch(parties.whole)["input_ids"]
    cache = DynamicCache(config=parties.whole.config)
    read(model, ids, cache)
    assert len(remote_caches(parties)) == 1
    del cache
    gc.collect()
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    assert not remote_caches(parties)


def test_a_hundred_generations_leave_at_most_one_cache_behind(cut):
    parties = cut("gpt2")
    prompt = tiny_batch(parties.whole, rows=1, length=2)
    for _ in range(100):
        parties.data_party.model.generate(**prompt, max_new_tokens=2, do_sample=False)
    gc.collect()
    assert len(remote_caches(parties)) <= 1


def test_generation_leaves_no_graph_at_the_model_party(cut):
    parties = cut("gpt2", 0, 1)
    cache = DynamicCache(config=parties.whole.config)
    ids = tiny_batch(parties.whole)["input_ids"]
    read(parties.data_party.model, ids, cache)
    session = parties.model_party.sessions[parties.data_party.connection.session]
    (half,) = session.caches
    assert not session.graphs
    filled = [layer.keys for layer in half.layers if layer.is_initialized]
    assert filled
    assert all(keys.grad_fn is None and not keys.requires_grad for keys in filled)


def test_a_static_cache_is_refused_by_name(cut):
    parties = cut("llama")
    prompt = tiny_batch(parties.whole)
    with pytest.raises(PartitionError, match=r"StaticCache.*Possible: DynamicCache.*dynamic"):
        parties.data_party.model.generate(**prompt, max_new_tokens=2, cache_implementation="static")
