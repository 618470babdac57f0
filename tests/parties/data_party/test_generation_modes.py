"""Generation by drafts, in a stream, from the last position only; models of two stacks and of linear attention."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import TextStreamer

from vflair_core import Partition, Transcript, split
from vflair_core.errors import PartitionError, ProtocolError
from vflair_core.testing import tiny_batch, tiny_model

CUTS = [(1, 1), (1, 0), (0, 2)]


def both(whole, head, tail):
    data_party, model_party = split(copy.deepcopy(whole), Partition(head, tail), wire=True)
    return data_party, model_party


@pytest.mark.parametrize(("head", "tail"), CUTS)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_prompt_lookup_crops_both_halves_of_the_cache(kind, head, tail):
    whole = tiny_model(kind)
    data_party, _ = both(whole, head, tail)
    prompt = {"input_ids": torch.tensor([[5, 9, 7, 5, 9, 7, 5, 9]])}
    prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
    options = {"max_new_tokens": 16, "min_new_tokens": 16, "prompt_lookup_num_tokens": 3}
    expected = whole.generate(**prompt, **options, do_sample=False)
    with data_party.channel.tap(Transcript()) as transcript:
        found = data_party.model.generate(**prompt, **options, do_sample=False)
    assert torch.equal(found, expected)
    widths = {r.tensor.shape[1] for r in transcript.messages if r.phase == "decode"}
    assert max(widths) > 1, "no draft was ever tried"


@pytest.mark.parametrize(("head", "tail"), CUTS)
def test_an_assistant_drafts_and_the_cut_model_decides(head, tail):
    whole, assistant = tiny_model("llama"), tiny_model("llama", seed=3, num_hidden_layers=2)
    data_party, _ = both(whole, head, tail)
    prompt = tiny_batch(whole, rows=1)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    expected = whole.generate(**prompt, **options, assistant_model=assistant)
    found = data_party.model.generate(**prompt, **options, assistant_model=assistant)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("padding", ["left", "right", None])
def test_batches_padded_on_either_side_are_continued_alike(padding):
    whole = tiny_model("qwen2")
    data_party, _ = both(whole, 1, 1)
    prompt = tiny_batch(whole, padding=padding)
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2}
    assert torch.equal(
        data_party.model.generate(**prompt, **options), whole.generate(**prompt, **options)
    )


def test_a_streamer_gets_the_words_one_by_one(capsys):
    class Tokenizer:
        def decode(self, ids, **_):
            return " ".join(map(str, [int(i) for i in ids])) + " "

    whole = tiny_model("gpt2")
    data_party, _ = both(whole, 1, 1)
    prompt = tiny_batch(whole, rows=1)
    texts = []
    for model in (whole, data_party.model):
        model.generate(
            **prompt, max_new_tokens=6, do_sample=False, streamer=TextStreamer(Tokenizer())
        )
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert len(texts[1].split()) > 5


def test_in_ht_the_logits_of_the_last_position_alone_come_back():
    whole = tiny_model("llama")
    data_party, _ = both(whole, 1, 0)
    prompt = tiny_batch(whole)
    with data_party.channel.tap(Transcript()) as transcript:
        data_party.model.generate(**prompt, max_new_tokens=3, do_sample=False)
    returned = [r.tensor.shape for r in transcript.messages if r.role == "returned"]
    assert returned == [(3, 1, whole.config.vocab_size)] * 3


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True}, {"use_cache": False}])
@pytest.mark.parametrize("tail", [0, 1])
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_models_of_two_stacks_write_the_same(build, kind, tail, options):
    whole = build(kind, "seq2seq").eval()
    data_party, _ = both(whole, 1, tail)
    prompt = tiny_batch(whole, padding="right")
    written = []
    for model in (whole, data_party.model):
        torch.manual_seed(4)
        written.append(model.generate(**prompt, max_new_tokens=5, min_new_tokens=5, **options))
    assert torch.equal(*written)


def test_no_state_of_an_encoder_crosses_undefended(build):
    """`generate` calls the encoder alone, and its states reach the decoder as an input: both are smashed data."""
    whole = build("bart", "seq2seq").eval()
    data_party, _ = both(whole, 1, 1)
    with data_party.channel.tap(Transcript()) as transcript:
        data_party.model.generate(**tiny_batch(whole), max_new_tokens=3, min_new_tokens=3)
    roles = {(r.name, r.role) for r in transcript.messages if r.kind == "forward"}
    assert ("encoder_hidden_states", "smashed") in roles
    assert {role for name, role in roles if name.endswith("hidden_states")} == {"smashed"}


@pytest.mark.parametrize("kind", ["mamba", "qwen3_next", "gemma2"])
def test_beams_over_caches_of_other_kinds(build, kind):
    whole = build(kind, "causal-lm").eval()
    data_party, _ = both(whole, 1, 1)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": 3}
    prompt = tiny_batch(whole)
    assert torch.equal(
        data_party.model.generate(**prompt, **options), whole.generate(**prompt, **options)
    )


def test_a_model_that_keeps_state_in_its_blocks_is_refused(build):
    data_party, _ = both(build("recurrent_gemma", "causal-lm").eval(), 1, 1)
    with pytest.raises(ProtocolError, match=r"recurrent_states.*keep what they computed"):
        data_party.model(**tiny_batch(data_party.model))


def test_layers_left_out_at_random_are_refused_in_training_only(build):
    whole = build("opt", "causal-lm")
    whole.model.decoder.layerdrop = 0.1
    data_party, _ = both(whole, 1, 1)
    batch = tiny_batch(whole, labels="tokens")
    assert torch.equal(data_party.model.eval()(**batch).loss, whole.eval()(**batch).loss)
    with pytest.raises(PartitionError, match=r"decoder.layerdrop is 0.1.*Set it to 0"):
        data_party.model.train()(**batch)


def test_what_a_model_sets_on_blocks_it_does_not_hold_is_refused(monkeypatch):
    data_party, _ = both(tiny_model("llama"), 1, 1)
    block = data_party.model.model.layers[1]
    with pytest.raises(PartitionError, match=r"sets 'window' of model.layers.1"):
        block.window = 3
    monkeypatch.setattr(type(block.skeleton), "set_mode", lambda _self: None, raising=False)
    with pytest.raises(PartitionError, match=r"calls set_mode\(\) of model.layers.1"):
        block.set_mode()


def test_blocks_that_share_weights_run_here_and_there(build):
    whole = build("albert", "classification")
    data_party, model_party = both(whole, 2, 1)
    (stage,) = data_party.stages
    assert stage.blocks == ("albert.encoder.albert_layer_groups.0",) * 2
    shared = {n for n, _ in data_party.named_parameters()} & {
        n for n, _ in model_party.named_parameters()
    }
    assert shared == set(data_party.untied)
    batch = tiny_batch(whole, labels="classes")
    assert torch.equal(data_party.model.eval()(**batch).loss, whole.eval()(**batch).loss)


@pytest.mark.parametrize(("head", "tail"), CUTS)
@pytest.mark.parametrize("kind", ["mistral", "gemma2"])
def test_drafts_are_taken_back_from_layers_of_a_sliding_window(build, kind, head, tail):
    whole = build(kind, "causal-lm").eval()
    for layer in range(len(getattr(whole.config, "layer_types", None) or ())):
        whole.config.layer_types[layer] = (
            "sliding_attention" if layer % 2 else whole.config.layer_types[layer]
        )
    whole.config.sliding_window = 4
    data_party, _ = both(whole, head, tail)
    prompt = {"input_ids": torch.tensor([[5, 9, 7, 5, 9, 7, 5, 9]])}
    prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "prompt_lookup_num_tokens": 3}
    expected = whole.generate(**prompt, **options, do_sample=False)
    assert torch.equal(data_party.model.generate(**prompt, **options, do_sample=False), expected)
