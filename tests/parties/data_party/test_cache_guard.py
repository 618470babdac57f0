"""A cache that was filled elsewhere is refused; a call that breaks off leaves both halves of a cache as they were."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

from vflair_core import Defense, Partition, split
from vflair_core.communication.cache_kinds import cache_argument
from vflair_core.errors import DefenseError, ProtocolError
from vflair_core.testing import tiny_batch, tiny_model

CUTS = [(1, 1), (1, 0), (0, 2)]


def past(model, cache):
    return {cache_argument(model): cache}


def both(kind, head=1, tail=1, task="causal-lm", **options):
    whole = tiny_model(kind, task)
    return whole, *split(copy.deepcopy(whole), Partition(head, tail), wire=True, **options)


@pytest.mark.parametrize(("head", "tail"), CUTS)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("new", [1, 3])
def test_a_cache_that_the_whole_model_filled_is_refused(kind, head, tail, new):
    whole, data_party, model_party = both(kind, head, tail)
    cache = whole(input_ids=torch.tensor([[5, 9, 7]]), use_cache=True).past_key_values
    before = [layer.keys.clone() for layer in cache.layers]
    with pytest.raises(ProtocolError, match="Begin with an empty cache"):
        data_party.model(
            input_ids=torch.ones(1, new, dtype=torch.long), **past(data_party.model, cache)
        )
    assert all(map(torch.equal, before, (layer.keys for layer in cache.layers)))
    assert not model_party.sessions[data_party.connection.session].caches


def test_a_cache_that_another_data_party_filled_is_refused():
    _, first, _ = both("llama")
    _, second, _ = both("llama")
    tokens = torch.tensor([[5, 9, 7]])
    cache = first.model(input_ids=tokens, use_cache=True).past_key_values
    with pytest.raises(ProtocolError, match="no cache"):
        second.model(input_ids=tokens, **past(second.model, cache))


def test_a_cache_that_only_the_head_filled_is_refused():
    _, data_party, _ = both("llama")
    cache, tokens = DynamicCache(config=data_party.model.config), torch.tensor([[5, 9, 7]])
    data_party.smashed(input_ids=tokens, **past(data_party.model, cache))
    with pytest.raises(ProtocolError, match="filled elsewhere"):
        data_party.model(input_ids=tokens, **past(data_party.model, cache))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("training", [True, False])
def test_prefix_tuning_is_refused_by_name(training):
    _, data_party, _ = both("llama")
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(data_party.model, config).train(training)
    with pytest.raises(ProtocolError, match="use prompt tuning or LoRA"):
        model(**tiny_batch(data_party.model, labels="tokens"))


def test_a_filled_cache_of_two_stacks_is_refused():
    whole, data_party, _ = both("t5", task="seq2seq")
    batch = tiny_batch(whole)
    start = torch.ones(len(batch["input_ids"]), 1, dtype=torch.long)
    outputs = whole(input_ids=batch["input_ids"], decoder_input_ids=start, use_cache=True)
    given = {"encoder_outputs": whole.get_encoder()(input_ids=batch["input_ids"])}
    with pytest.raises(ProtocolError, match="filled elsewhere"):
        data_party.model(
            **given,
            decoder_input_ids=start,
            **past(data_party.model, outputs.past_key_values),
        )


class RefusesOnce(Defense):
    """Refuses the messages of some exchanges, on the way out or on the way back."""

    def __init__(self, where):
        self.where, self.refuse = where, False

    def on_smashed(self, smashed, exchange):
        return self._pass(smashed, "smashed")

    def on_returned(self, returned, exchange):
        return self._pass(returned, "returned")

    def _pass(self, tensor, where):
        if self.refuse and self.where == where:
            raise DefenseError("not this one")
        return tensor


def steps(model, cache, texts, broken=(), defense=None, **fixed):
    logits = []
    for number, text in enumerate(texts):
        if number in broken:
            defense.refuse = True
            with pytest.raises(DefenseError):
                model(**text, **past(model, cache), **fixed)
            defense.refuse = False
        logits.append(model(**text, **past(model, cache), **fixed).logits)
    return logits


def tokens(*rows, name="input_ids"):
    return [{name: torch.tensor([row])} for row in rows]


@pytest.mark.parametrize(("head", "tail"), CUTS)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@torch.no_grad()
def test_after_a_refused_call_a_cache_goes_on(kind, head, tail):
    defense = RefusesOnce("smashed")
    whole, data_party, _ = both(kind, head, tail, defenses=[defense])
    texts = tokens([5, 9, 7], [4], [8, 2])
    expected = steps(whole, DynamicCache(config=whole.config), texts)
    cache = DynamicCache(config=whole.config)
    found = steps(data_party.model, cache, texts, (0, 1, 2), defense)
    assert all(map(torch.equal, expected, found))


def cache_of_two(model):
    return EncoderDecoderCache(DynamicCache(), DynamicCache())


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize("broken", [(0,), (1,), (0, 1, 2)])
@torch.no_grad()
def test_after_a_refused_call_a_cache_of_two_stacks_goes_on(kind, broken):
    defense = RefusesOnce("smashed")
    whole, data_party, _ = both(kind, task="seq2seq", defenses=[defense])
    source = tiny_batch(whole, rows=1)["input_ids"]
    texts = tokens([5], [4], [8], name="decoder_input_ids")
    fixed = {"encoder_outputs": whole.get_encoder()(input_ids=source)}
    expected = steps(whole, cache_of_two(whole), texts, **fixed)
    fixed = {"encoder_outputs": data_party.model.get_encoder()(input_ids=source)}
    found = steps(data_party.model, cache_of_two(whole), texts, broken, defense, **fixed)
    assert all(map(torch.equal, expected, found))


@torch.no_grad()
def test_a_cache_that_only_the_model_party_filled_is_of_no_further_use():
    defense = RefusesOnce("returned")
    whole, data_party, _ = both("llama", defenses=[defense])
    cache, (first, second) = DynamicCache(config=whole.config), tokens([5, 9, 7], [4])
    data_party.model(**first, **past(data_party.model, cache))
    defense.refuse = True
    with pytest.raises(DefenseError):
        data_party.model(**second, **past(data_party.model, cache))
    defense.refuse = False
    for given in (cache, copy.deepcopy(cache)):
        with pytest.raises(ProtocolError, match="Begin with a new one"):
            data_party.model(**second, **past(data_party.model, given))


@pytest.mark.parametrize(("head", "tail"), CUTS)
def test_a_cache_whose_values_have_gradients_is_continued(head, tail):
    whole, data_party, _ = both("llama", head, tail)
    texts = tokens([5, 9, 7], [4], [8, 2])
    expected = steps(whole, DynamicCache(config=whole.config), texts)
    found = steps(data_party.model, DynamicCache(config=whole.config), texts)
    assert all(map(torch.equal, expected, found))
    assert found[-1].requires_grad
