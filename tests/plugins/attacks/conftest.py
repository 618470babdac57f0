"""A training round of each example alone, as a model party sees it, with the halves an attacker may hold."""

from __future__ import annotations

import pytest
import torch

from vflair_core import Transcript, split
from vflair_core.attacks.halves import halves
from vflair_core.attacks.observables import Observables


@pytest.fixture
def crossing():
    """Return a function: (model, partition, batches, task) → all that an attack on labels may ask for."""

    def cross(model, partition, batches, task_kind="classification", *, training=True):
        head, tail = halves(model, partition)
        party, _ = split(model, partition)
        party.model.train(training)
        with party.channel.tap(Transcript()) as transcript:
            for batch in batches:
                party.model(**batch, use_cache=False).loss.backward()
        seen = Observables(transcript.messages, is_ht=partition.kind == "HT", victims=len(batches))
        return {
            **seen,
            "partition": partition,
            "task_kind": task_kind,
            "head": head,
            "tail": tail,
            "generator": torch.Generator().manual_seed(0),
        }

    return cross
