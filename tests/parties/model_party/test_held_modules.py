"""What the model party looks up in every call is what is there now."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from vflair_core.communication.cache_kinds import cache_argument
from vflair_core.errors import ProtocolError
from vflair_core.partition.module_tree import replace_module
from vflair_core.testing import tiny_batch

BLOCK = "model.layers.1"


class Shifted(nn.Module):
    """Stands around a block, as adapters do."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, *args, **kwargs):
        return self.block(*args, **kwargs) + 1


def test_a_module_that_took_the_place_of_a_held_one_is_called(cut):
    parties = cut("llama")
    batch = tiny_batch(parties.whole)
    parties.data_party.model(**batch)
    for model in (parties.model_party.model, parties.whole):
        replace_module(model, BLOCK, Shifted(model.get_submodule(BLOCK)))
    assert torch.equal(parties.data_party.model(**batch).logits, parties.whole(**batch).logits)


def test_messages_go_to_where_the_first_weight_is_now(cut):
    model_party = cut("llama").model_party
    assert model_party.device == next(model_party.model.parameters()).device
    model_party.model.to("meta")
    assert model_party.device == torch.device("meta")
    model_party.model = nn.Module()
    assert model_party.device == torch.device("cpu")


def test_a_cache_is_as_it_was_before_a_forward_that_fails_in_the_middle(cut, monkeypatch):
    parties = cut("llama")
    ids = tiny_batch(parties.whole)["input_ids"]
    cache = DynamicCache(config=parties.whole.config)
    cached = {cache_argument(parties.whole): cache}
    with torch.no_grad():
        parties.data_party.model(ids, **cached)
    (session,) = parties.model_party.sessions.values()
    (held,) = session.caches
    before = [(layer, dict(vars(layer))) for layer in held.layers]
    last = parties.model_party.model.get_submodule("model.layers.2")

    def fail(*_args, **_kwargs):
        raise ValueError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(last, "forward", fail)
        with torch.no_grad(), pytest.raises(ProtocolError, match="no memory"):
            parties.data_party.model(ids[:, :1], **cached)
    for layer, (same, state) in zip(held.layers, before, strict=True):
        assert layer is same
        assert vars(layer).keys() == state.keys()
        assert all(vars(layer)[name] is value for name, value in state.items())
