"""Models whose blocks are laid out or called in ways of their own, cut and compared with the whole model."""

from __future__ import annotations

import copy

import attrs
import pytest
import torch
from transformers import AutoConfig, EncoderDecoderConfig, EncoderDecoderModel, MllamaForCausalLM
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

from support.small_models import ZAMBA2
from vflair_core import load_data_party, load_model_party
from vflair_core.communication import codec
from vflair_core.communication.program import Program
from vflair_core.errors import PartitionError, ProtocolError
from vflair_core.parties.split import split
from vflair_core.partition.partition import Partition
from vflair_core.testing import tiny_batch, tiny_model
from vflair_core.testing.models import SIZES

XLM = {"emb_dim": 16, "n_layers": 4, "n_heads": 2, "pad_index": 0, "eos_index": 2}
MINIMAX = {
    "intermediate_size": 32,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "block_size": 4,
    "num_local_experts": 2,
    "layer_types": ["full_attention", "linear_attention"] * 2,
}
MLLAMA = {
    "num_hidden_layers": 5,
    "cross_attention_layers": [1, 3],
    "intermediate_size": 32,
    "num_key_value_heads": 1,
}
GEMMA3N = {
    "num_hidden_layers": 5,
    "layer_types": [
        f"{kind}_attention" for kind in ("sliding", "full", "sliding", "sliding", "full")
    ],
    "num_kv_shared_layers": 2,
    "sliding_window": 4,
    "intermediate_size": [32] * 5,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "hidden_size_per_layer_input": 4,
    "vocab_size_per_layer_input": 64,
    "laurel_rank": 4,
    "activation_sparsity_pattern": [0.0] * 5,
}
NANOCHAT = {"intermediate_size": 32, "num_key_value_heads": 2}


def mllama():
    return MllamaForCausalLM(MllamaTextConfig(**SIZES | MLLAMA)).eval()


def assert_same_step(parties, batch):
    """Loss and logits bit for bit, the gradients of all weights but for the order in which they are summed."""
    expected = parties.whole(**batch)
    found = parties.data_party.model(**batch)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss)
    expected.loss.backward()
    found.loss.backward()
    sides = (parties.data_party, parties.model_party)
    ours = {name: weight for side in sides for name, weight in side.named_parameters()}
    for name, weight in parties.whole.named_parameters():
        if weight.grad is not None and not parties.data_party.untied:
            torch.testing.assert_close(
                ours[name].grad, weight.grad, rtol=1e-4, atol=1e-6, equal_nan=True
            )


def assert_same_writing(parties, batch, **options):
    prompt = {key: batch[key] for key in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False} | options
    expected = parties.whole.generate(**prompt, **options)
    assert torch.equal(parties.data_party.model.generate(**prompt, **options), expected)


@pytest.mark.parametrize(("head", "tail"), [(1, 1), (0, 2), (2, 1), (1, 0)])
@pytest.mark.parametrize("kind", ["xlm", "flaubert"])
def test_blocks_in_parallel_lists_are_cut_by_their_number(cut, kind, head, tail):
    parties = cut(kind, head, tail, model=tiny_model(kind, "classification", **XLM), wire=True)
    (stage,) = parties.data_party.stages
    parts = ("attentions", "layer_norm1", "ffns", "layer_norm2")
    numbers = range(head, 4 - tail)
    assert stage.blocks == tuple(f"transformer.{part}.{n}" for n in numbers for part in parts)
    for side in ("right", None):
        assert_same_step(parties, tiny_batch(parties.whole, padding=side, labels="classes"))


@pytest.mark.parametrize(("head", "tail"), [(1, 1), (0, 1), (0, 2), (1, 0)])
def test_blocks_for_pictures_are_left_out_where_there_is_none(cut, head, tail):
    parties = cut("mllama", head, tail, model=mllama(), wire=True)
    (stage,) = parties.data_party.stages
    assert stage.optional == {"model.layers.1", "model.layers.3"} & set(stage.blocks)
    batch = tiny_batch(parties.whole, padding="left", labels="tokens")
    assert_same_step(parties, batch)
    assert_same_writing(parties, batch)
    assert_same_writing(parties, batch, num_beams=2)


def test_a_model_party_with_nothing_but_blocks_for_pictures_is_refused():
    config = MllamaTextConfig(**SIZES | MLLAMA | {"cross_attention_layers": [1, 4]})
    with pytest.raises(PartitionError, match=r"calls none of model\.layers\.4"):
        split(MllamaForCausalLM(config), Partition(head=4, tail=0))


def test_blocks_for_pictures_are_run_where_there_is_one(cut):
    parties = cut("mllama", 1, 1, model=mllama(), wire=True)
    for model in (parties.whole, parties.data_party.model):
        for name, weight in model.named_parameters():
            if name.endswith("gate"):
                weight.data.fill_(0.5)
    for name, weight in parties.model_party.named_parameters():
        if name.endswith("gate"):
            weight.data.fill_(0.5)
    batch = tiny_batch(parties.whole, labels="tokens")
    seen = torch.randn(len(batch["input_ids"]), 6, 16)
    without = parties.whole(**batch).logits
    batch |= {"cross_attention_states": seen, "use_cache": False}
    assert not torch.equal(parties.whole(**batch).logits, without)
    assert_same_step(parties, batch)


@pytest.mark.parametrize(("head", "tail"), [(1, 1), (0, 2), (2, 0)])
def test_a_cache_that_makes_its_own_layers_lives_in_two_halves(cut, head, tail):
    parties = cut("minimax", head, tail, model=tiny_model("minimax", **MINIMAX), wire=True)
    batch = tiny_batch(parties.whole, padding="left", labels="tokens")
    assert_same_step(parties, batch)
    assert_same_writing(parties, batch)
    assert_same_writing(parties, batch, num_beams=2)


@pytest.mark.parametrize(("head", "tail"), [(1, 1), (2, 2), (1, 0)])
def test_a_part_that_blocks_of_both_parties_share_is_held_by_both(cut, head, tail):
    parties = cut("zamba2", head, tail, model=tiny_model("zamba2", **ZAMBA2), wire=True)
    batch = tiny_batch(parties.whole, padding="left", labels="tokens")
    assert_same_step(parties, batch)
    assert_same_writing(parties, batch)


@pytest.mark.parametrize(("head", "tail"), [(1, 1), (2, 2), (3, 1), (1, 0)])
def test_states_that_blocks_share_across_the_cut_are_sent_there_and_back(cut, head, tail):
    """The last two blocks of gemma3n use keys and values of the second and third again."""
    parties = cut("gemma3n", head, tail, model=tiny_model("gemma3n_text", **GEMMA3N), wire=True)
    for side in ("left", None):
        batch = tiny_batch(parties.whole, padding=side, labels="tokens")
        assert_same_step(parties, batch)
        assert_same_writing(parties, batch)


def test_in_ht_no_message_gets_what_blocks_share(cut):
    parties = cut("gemma3n", 1, 0, model=tiny_model("gemma3n_text", **GEMMA3N), wire=True)
    said = []
    with parties.data_party.channel.tap(lambda message, *_: said.append(message)):
        parties.data_party.model(**tiny_batch(parties.whole), use_cache=False)
    steps, leaves, store = said[0].meta["program"]
    assert store is False
    program = Program.from_wire([steps, leaves, True])
    meta = {**said[0].meta, "program": program.to_wire(), "id": program.id}
    with pytest.raises(ProtocolError, match="in HT there are none"):
        parties.model_party.handle(
            codec.decode(
                codec.encode(
                    attrs.evolve(
                        said[0],
                        seq=parties.model_party.sessions[said[0].session].seq + 1,
                        meta=meta,
                    )
                )
            )
        )


def test_a_value_that_a_model_needs_twice_is_fetched_once(cut):
    """The last norm of nanochat has no weights: the data party runs it, and uses its input twice."""
    parties = cut("nanochat", 1, 0, model=tiny_model("nanochat", **NANOCHAT), wire=True)
    batch = tiny_batch(parties.whole, labels="tokens")
    assert_same_step(parties, batch)
    said = []
    with parties.data_party.channel.tap(lambda message, *_: said.append(message.kind)):
        parties.data_party.model(**batch)
    assert said.count("forward") == 4  # blocks and head, there and back


def test_a_tensor_changed_in_place_after_it_was_taken_is_not_sent():
    model = tiny_model("llama")
    data_party, _ = split(model, Partition(head=1, tail=1))
    second = data_party.model.model.layers[2]
    taken = []

    def change(_module, args):
        taken[0].add_(1.0)

    data_party.model.model.layers[0].register_forward_hook(
        lambda _module, _args, out: taken.append(out)
    )
    second.register_forward_pre_hook(change)
    with torch.no_grad(), pytest.raises(PartitionError, match="changed 'hidden_states' in place"):
        data_party.model(**tiny_batch(data_party.model))


@pytest.mark.filterwarnings("ignore:Version v4.12.0 introduces:FutureWarning")
def test_states_that_a_pooler_and_a_decoder_both_need_are_sent_back_in_between(cut):
    """The encoder of an encoder-decoder of two BERTs pools what the decoder looks at."""
    bert = AutoConfig.for_model("bert", intermediate_size=32, **SIZES)
    config = EncoderDecoderConfig.from_encoder_decoder_configs(
        bert, copy.deepcopy(bert), pad_token_id=0, decoder_start_token_id=1
    )
    parties = cut(head=1, tail=0, model=EncoderDecoderModel(config).eval(), wire=True)
    encoder, decoder = parties.data_party.stages
    assert (encoder.pauses, decoder.pauses) == ({"encoder.encoder.layer.3"}, set())
    assert_same_step(parties, tiny_batch(parties.whole, labels="tokens"))


def between_blocks(change):
    """A whole llama and its data party; `change` gets what the third block gets and returns what it is to get."""
    model = tiny_model("llama")
    models = copy.deepcopy(model), split(model, Partition(head=1, tail=1))[0].model
    for each in models:
        each.model.layers[2].register_forward_pre_hook(
            lambda _module, args, kwargs: ((change(args[0]), *args[1:]), kwargs), with_kwargs=True
        )
    return models


def added_in_place(hidden):
    hidden += torch.ones(16)
    return hidden


def added_to_a_view_in_place(hidden):
    row = hidden[:, 0]
    row += torch.ones(16)
    return hidden


@pytest.mark.parametrize(
    "change",
    [
        lambda hidden: hidden + torch.ones(16),
        lambda hidden: torch.ones(7, 16) + hidden,
        lambda hidden: hidden * torch.full((3, 7, 1), 2.0),
        lambda hidden: hidden * 2.0 + hidden,
        added_in_place,
    ],
)
def test_sums_and_products_between_blocks_are_recorded(change):
    whole, ours = between_blocks(change)
    batch = tiny_batch(whole, labels="tokens")
    expected, found = whole(**batch), ours(**batch)
    assert torch.equal(found.logits, expected.logits)
    expected.loss.backward()
    found.loss.backward()
    assert torch.equal(ours.lm_head.weight.grad, whole.lm_head.weight.grad)


@pytest.mark.parametrize(
    "change", [added_to_a_view_in_place, torch.exp, lambda hidden: torch.cat([hidden, hidden])]
)
def test_what_cannot_be_recorded_between_blocks_is_refused(change):
    whole, ours = between_blocks(change)
    with pytest.raises(PartitionError, match=r"needs a value after model\.layers\.1"):
        ours(**tiny_batch(whole))


@pytest.mark.parametrize("tail", [1, 0], ids=["HBT", "HT"])
@pytest.mark.parametrize(
    ("kind", "task", "options"),
    [
        ("xlm", "classification", XLM),
        ("minimax", "causal-lm", MINIMAX),
        ("zamba2", "causal-lm", ZAMBA2),
        ("gemma3n_text", "causal-lm", GEMMA3N),
        ("mllama", "causal-lm", None),
    ],
)
def test_the_loaded_halves_of_odd_models_are_cut_alike(tmp_path, kind, task, options, tail):
    whole = mllama() if options is None else tiny_model(kind, task, **options)
    whole.save_pretrained(tmp_path)
    partition = Partition(1, tail)
    model_party = load_model_party(tmp_path, partition)
    data_party = load_data_party(tmp_path, partition, channel=model_party.handle, wire=True)
    expected, _ = split(copy.deepcopy(whole), partition)
    assert data_party.stages == expected.stages
    batch = tiny_batch(whole)
    with torch.no_grad():
        assert torch.equal(data_party.model(**batch).logits, whole(**batch).logits)
