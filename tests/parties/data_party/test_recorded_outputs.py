"""A loss that a model makes of the routers of all its blocks is refused where some are the model party's, and never made of the rest."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    MixtralForSequenceClassification,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

from vflair_core import Partition, PartitionError, split

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
NARROW = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
SWITCH = {
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 4,
    "num_decoder_layers": 4,
    "num_sparse_encoder_layers": 2,
    "num_sparse_decoder_layers": 2,
    "num_heads": 4,
    "num_experts": 4,
    "decoder_start_token_id": 0,
}
MIXTURES = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4)),
    "qwen2-moe": lambda: Qwen2MoeForCausalLM(Qwen2MoeConfig(**SMALL, **NARROW, num_experts=4)),
    "gpt-oss": lambda: GptOssForCausalLM(GptOssConfig(**SMALL, num_local_experts=4, head_dim=8)),
    "granite-moe": lambda: GraniteMoeForCausalLM(GraniteMoeConfig(**SMALL, num_local_experts=4)),
    "switch": lambda: SwitchTransformersForConditionalGeneration(
        SwitchTransformersConfig(**SWITCH)
    ),
}


def cut_in_two(kind, partition):
    torch.manual_seed(0)
    whole = MIXTURES[kind]().eval()
    data_party, _ = split(copy.deepcopy(whole), partition)
    ids = torch.randint(3, 60, (2, 7))
    return whole, data_party, {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("partition", [Partition(1, 1), Partition(1, 0)], ids=str)
@pytest.mark.parametrize("kind", MIXTURES)
def test_who_asks_for_the_routers_of_all_blocks_is_refused_before_anything_crosses(kind, partition):
    whole, data_party, batch = cut_in_two(kind, partition)
    crossed = data_party.calls.exchanges
    with pytest.raises(PartitionError, match=r"output_router_logits is set.*auxiliary loss"):
        data_party.model(**batch, output_router_logits=True)
    data_party.model.config.output_router_logits = True
    with pytest.raises(PartitionError, match=type(whole.config).__name__):
        data_party.model(**batch)
    assert data_party.calls.exchanges == crossed
    # A call says otherwise than the config; the loss of the labels is that of the whole model.
    found = data_party.model(**batch, output_router_logits=False, use_cache=False)
    expected = whole(**batch, output_router_logits=False, use_cache=False)
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.logits, expected.logits)


def test_an_inner_model_that_is_called_alone_and_generation_are_refused_too():
    _, data_party, batch = cut_in_two("mixtral", Partition(1, 1))
    with pytest.raises(PartitionError, match="output_router_logits"):
        data_party.model.model(input_ids=batch["input_ids"], output_router_logits=True)
    data_party.model.config.output_router_logits = True
    with pytest.raises(PartitionError, match="output_router_logits"):
        data_party.model.generate(batch["input_ids"], max_new_tokens=2)


def test_where_every_router_is_here_the_auxiliary_loss_is_the_whole_models():
    torch.manual_seed(0)
    kind = {**SMALL, **NARROW, "num_experts": 4, "mlp_only_layers": [1, 2]}
    whole = Qwen2MoeForCausalLM(Qwen2MoeConfig(**kind, output_router_logits=True)).eval()
    data_party, _ = split(copy.deepcopy(whole), Partition(1, 1))
    ids = torch.randint(3, 60, (2, 7))
    found, expected = data_party.model(ids, labels=ids), whole(ids, labels=ids)
    torch.testing.assert_close(found.aux_loss, expected.aux_loss)
    torch.testing.assert_close(found.loss, expected.loss)


def test_a_classifier_makes_no_such_loss_and_is_asked_for_none():
    torch.manual_seed(0)
    whole = MixtralForSequenceClassification(MixtralConfig(**SMALL, num_local_experts=4)).eval()
    data_party, _ = split(copy.deepcopy(whole), Partition(1, 0))
    ids = torch.randint(3, 60, (2, 7))
    torch.testing.assert_close(data_party.model(ids).logits, whole(ids).logits)
