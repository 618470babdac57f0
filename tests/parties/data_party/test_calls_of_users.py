"""Ways of calling the model that users have: each gives what the unsplit model gives, or says why it cannot."""

from __future__ import annotations

import copy

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vflair_core import Partition, split
from vflair_core.errors import PartitionError
from vflair_core.testing import tiny_batch, tiny_model

CUTS = [Partition(1, 1), Partition(1, 0)]


@pytest.fixture(params=CUTS, ids=lambda partition: partition.kind)
def partition(request):
    return request.param


def both(kind, partition, task="causal-lm", **options):
    whole = tiny_model(kind, task)
    return whole, *split(copy.deepcopy(whole), partition, wire=True, **options)


def tokenizer():
    """64 pieces of bytes: the first letters, and pairs of them."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:62]
    made = Tokenizer(
        models.BPE({letter: n for n, letter in enumerate([*letters, "<e>", "<p>"])}, [])
    )
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<e>", pad_token="<p>")


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_generation_stops_at_a_word(kind, partition):
    words = tokenizer()
    whole, data_party, _ = both(kind, partition, tokenizer=words)
    prompt = {"input_ids": torch.tensor([[5, 9, 7]])}
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 63}
    free = whole.generate(**prompt, **options)
    stop = {"stop_strings": [words.decode(free[0, 6:7])], "tokenizer": words}
    expected = whole.generate(**prompt, **options, **stop)
    assert expected.shape[1] < free.shape[1]
    assert torch.equal(data_party.model.generate(**prompt, **options, **stop), expected)
    asked = data_party.ask([words.decode(prompt["input_ids"][0])], **options, **stop)
    assert asked == [words.decode(expected[0, 3:], skip_special_tokens=True)]


@pytest.mark.parametrize("kind", ["bart", "marian"])
def test_drafts_from_the_prompt_of_two_stacks(kind, partition):
    whole, data_party, _ = both(kind, partition, "seq2seq")
    whole.generation_config.decoder_start_token_id = 3
    data_party.model.generation_config.decoder_start_token_id = 3
    prompt = {"input_ids": torch.tensor([[5, 9, 7, 5, 9, 7, 5, 9]])}
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "prompt_lookup_num_tokens": 3}
    expected = whole.generate(**prompt, **options, do_sample=False)
    assert torch.equal(data_party.model.generate(**prompt, **options, do_sample=False), expected)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("compiled", [torch.compile, lambda model: model.compile() or model])
def test_a_compiled_model_gives_the_same(compiled, partition):
    whole, data_party, _ = both("llama", partition)
    batch = tiny_batch(whole, labels="tokens")
    model = compiled(data_party.model)
    outputs, expected = model(**batch), whole(**batch)
    assert torch.equal(outputs.logits, expected.logits)
    outputs.loss.backward()
    expected.loss.backward()
    names = dict(whole.named_parameters())
    assert all(torch.equal(w.grad, names[n].grad) for n, w in data_party.named_parameters())


def test_embeddings_grow_with_an_output_layer_that_is_held():
    whole, data_party, _ = both("llama", Partition(1, 1))
    for model in (whole, data_party.model):
        torch.manual_seed(0)
        model.resize_token_embeddings(70)
    batch = {"input_ids": torch.tensor([[5, 69, 7]])}
    assert torch.equal(data_party.model(**batch).logits, whole(**batch).logits)


def test_embeddings_do_not_grow_without_their_output_layer():
    _, data_party, _ = both("llama", Partition(1, 0))
    with pytest.raises(PartitionError, match="Resize them before the model is cut"):
        data_party.model.resize_token_embeddings(70)
    assert data_party.model.get_input_embeddings().weight.shape[0] == 64


FAMILIES = ["gpt2", "gpt_neo", "gpt_bigcode", "openai-gpt"]


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_program_does_not_know_the_length(kind, build):
    whole = build(kind, "causal-lm").eval()
    data_party, model_party = split(copy.deepcopy(whole), Partition(1, 0), wire=True)
    with torch.no_grad():
        for length in (3, 4, 5, 6):
            tokens = {"input_ids": torch.arange(1, length + 1)[None]}
            assert torch.equal(data_party.model(**tokens).logits, whole(**tokens).logits)
    (session,) = model_party.sessions.values()
    assert len(session.jobs) == 1


def test_programs_that_were_not_used_for_long_make_room(monkeypatch):
    monkeypatch.setattr("vflair_core.communication.connection.MAX_PROGRAMS", 3)
    whole, data_party, model_party = both("llama", Partition(1, 1))
    model_party.caps.programs = 4
    batch = tiny_batch(whole)
    calls = [{"output_attentions": a, "use_cache": c} for a in (True, False) for c in (True, False)]
    with torch.no_grad():
        for _ in range(2):
            for number in range(1, 5):
                given = {key: value[:number] for key, value in batch.items()}
                for options in calls:
                    for bias in (False, True):
                        mask = (
                            {"attention_mask": torch.ones_like(given["input_ids"])} if bias else {}
                        )
                        inputs = {"input_ids": given["input_ids"], **mask, **options}
                        assert torch.equal(
                            data_party.model(**inputs).logits, whole(**inputs).logits
                        )
    (session,) = model_party.sessions.values()
    assert len(session.jobs) <= 4


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_an_inner_model_may_be_called_by_itself(kind, partition):
    whole, data_party, _ = both(
        kind, partition, "classification" if kind == "bert" else "causal-lm"
    )
    batch = tiny_batch(whole)
    name = whole.base_model_prefix
    expected, found = getattr(whole, name)(**batch), getattr(data_party.model, name)(**batch)
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
    assert type(found) is type(expected)
    found.last_hidden_state.square().sum().backward()
    expected.last_hidden_state.square().sum().backward()
    names = dict(whole.named_parameters())
    for owner, weight in data_party.named_parameters():
        both_of = (weight.grad, names[owner].grad)
        assert both_of == (None, None) or torch.equal(*both_of), owner


def test_the_output_layer_alone_is_refused_by_name():
    _, data_party, _ = both("llama", Partition(1, 0))
    hidden = data_party.model.model(input_ids=torch.tensor([[5, 9]])).last_hidden_state
    with pytest.raises(
        PartitionError, match="lm_head is the model party's, and was called by itself"
    ):
        data_party.model.lm_head(hidden)


def test_a_copy_of_half_a_model_is_refused(partition):
    _, data_party, _ = both("llama", partition)
    with pytest.raises(PartitionError, match="Copy the whole model before it is cut"):
        copy.deepcopy(data_party.model)


def test_embeddings_that_need_not_grow_are_left_alone():
    _, data_party, _ = both("gpt2", Partition(1, 0))
    table = data_party.model.get_input_embeddings()
    assert data_party.model.resize_token_embeddings(64) is table
    with pytest.raises(PartitionError, match="before the model is cut"):
        data_party.model.resize_token_embeddings(64, pad_to_multiple_of=128)


def test_what_an_inner_model_passed_by_is_an_error_when_it_is_used():
    whole, data_party, _ = both("bert", Partition(1, 0), "classification")
    batch = tiny_batch(whole)
    found, expected = data_party.model.bert(**batch), whole.bert(**batch)
    assert torch.equal(found.pooler_output, expected.pooler_output)
    with pytest.raises(PartitionError, match="from the middle of the model party's layers"):
        found.last_hidden_state.sum()
