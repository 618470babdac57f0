"""What a data party is told of a checkpoint at the model party that cannot be used."""

from __future__ import annotations

import pytest

from vflair_core import CheckpointError, FineTuning, Partition, Train, split
from vflair_core.testing import tiny_batch, tiny_model


def test_an_error_does_not_say_where_the_model_party_keeps_its_files(tmp_path):
    def start():
        data_party, model_party = split(tiny_model("llama"), Partition(1, 1), wire=True)
        model_party.checkpoints = tmp_path / "secret place"
        return FineTuning(data_party, Train(steps=2, learning_rate=0.1))

    tuning = start()
    tuning.step(tiny_batch(tiny_model("llama"), labels="tokens"))
    tuning.save(tmp_path / "data party")
    (part,) = (tmp_path / "secret place").rglob("*.safetensors")
    damaged = bytearray(part.read_bytes())
    damaged[-1] ^= 1
    part.write_bytes(damaged)
    with pytest.raises(CheckpointError) as refused:
        start().load(tmp_path / "data party")
    assert part.name in str(refused.value)
    assert "secret place" not in str(refused.value)
    assert str(tmp_path) not in str(refused.value)
