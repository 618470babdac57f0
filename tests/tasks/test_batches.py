"""A batch knows whether the defenses of text have acted on it, wherever it is moved."""

from __future__ import annotations

import pytest
import torch

from support.foreign_device import DEVICES, device_called
from vflair_core import Batch, Defense, DefenseError, Example, Partition, split
from vflair_core.testing import tiny_model, tiny_tokenizer


class Upper(Defense):
    def on_text(self, fields):
        return {name: text.upper() for name, text in fields.items()}


def party_with(*defenses):
    return split(
        tiny_model("llama"), Partition(1, 1), tokenizer=tiny_tokenizer(64), defenses=defenses
    )[0]


def test_a_batch_that_came_through_the_defenses_says_so_and_one_that_did_not_is_refused():
    party = party_with(Upper())
    batch = party.encode([Example("7 8 9")])
    assert isinstance(batch, Batch)
    assert batch.defended
    party.model(**batch)
    bare = {name: tensor.clone() for name, tensor in batch.items()}
    assert not Batch(bare).defended
    with pytest.raises(DefenseError, match="Upper changes text before it is sent"):
        party.model(**bare)


@pytest.mark.parametrize("part", [lambda ids: ids[:1], lambda ids: ids + 0, torch.clone])
def test_what_is_made_of_a_defended_batch_is_not_defended(part):
    party = party_with(Upper())
    batch = party.encode([Example("7 8 9"), Example("9 8 7")])
    made = {name: part(tensor) for name, tensor in batch.items()}
    with pytest.raises(DefenseError, match="did not come through it"):
        party.model(**made)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("defenses", [(), (Upper(),)], ids=["bare", "defended"])
def test_a_batch_stays_what_it_is_when_it_is_moved(device, defenses):
    batch = party_with(Upper()).encode([Example("7 8 9")])
    batch = batch if defenses else Batch({name: t.clone() for name, t in batch.items()})
    with device_called(device) as place:
        moved = batch.to(place)
        assert moved.defended == batch.defended == bool(defenses)
        assert {tensor.device.type for tensor in moved.values()} == {place.type}
    assert batch.to("cpu") is batch


@pytest.mark.parametrize("device", DEVICES)
def test_a_data_party_elsewhere_takes_its_own_batches(device):
    party = party_with(Upper())
    with device_called(device) as place:
        party.model.to(place)
        batch = party.preprocessor(16).batch([Example("7 8 9")]).batch
        assert batch.defended
        assert batch["input_ids"].device == party.model.device
