"""What is remembered from one block or step to the next is looked at again as soon as it has changed."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from vflair_core.communication.cache_kinds import cache_argument
from vflair_core.parties.data_party.dry_runs import DryRuns
from vflair_core.parties.data_party.recorder import Recorder
from vflair_core.testing import tiny_batch

WIDTH = 16  # of the hidden states


@pytest.fixture
def recorder(cut):
    """The recorder of a data party that lacks two blocks."""
    return cut("llama", 1, 1).data_party.calls.recorder


def recorded(recorder, *arguments):
    """What a program says of an argument that is given to one absent block after the other; nothing is sent."""
    programs = []

    def keep(program, *_):
        programs.append(program)
        return [torch.zeros(1, 3, WIDTH)]

    recorder.handover = keep
    hidden = torch.randn(1, 3, WIDTH)
    for stub, argument in zip(recorder.absent.values(), arguments, strict=True):
        hidden = stub(hidden, position_embeddings=argument())
    (program,) = programs
    return [dict(kwargs)["position_embeddings"] for _, _, _, kwargs in program.steps]


def tables():
    return torch.randn(1, 3, 8), torch.randn(1, 3, 8)


def test_a_tuple_of_tensors_that_comes_again_is_the_same_tensors(recorder):
    pair = tables()
    first, second = recorded(recorder, lambda: pair, lambda: pair)
    assert first == second == ("tuple", ("leaf", 1), ("leaf", 2))


def test_a_list_that_changed_between_two_blocks_is_read_again(recorder):
    pair = list(tables())

    def changed():
        pair.reverse()
        return pair

    first, second = recorded(recorder, lambda: pair, changed)
    assert first == ("list", ("leaf", 1), ("leaf", 2))
    assert second == ("list", ("leaf", 2), ("leaf", 1))


def test_other_tensors_of_equal_content_are_other_tensors(recorder):
    """Even where the first are gone and the second may lie in their place."""
    first, second = recorded(recorder, tables, tables)
    assert first == ("tuple", ("leaf", 1), ("leaf", 2))
    assert second == ("tuple", ("leaf", 3), ("leaf", 4))


def test_a_program_remembers_nothing_of_the_one_before(recorder):
    one, other = tables(), tables()
    recorded(recorder, lambda: one, lambda: one)
    first, _ = recorded(recorder, lambda: other, lambda: one)
    assert first == ("tuple", ("leaf", 1), ("leaf", 2))


@pytest.fixture
def probes(monkeypatch):
    """Counts the runs that send nothing."""
    count = []
    probing = DryRuns.probing

    def counted(self, probe):
        count.append(probe)
        return probing(self, probe)

    monkeypatch.setattr(DryRuns, "probing", counted)
    return count


def generated(model, ids):
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=20,
        min_new_tokens=20,
        do_sample=False,
        pad_token_id=0,
    )


def test_a_prompt_of_a_form_met_before_needs_no_probe_however_long_was_generated(cut, probes):
    parties = cut("llama")
    ids = tiny_batch(parties.whole)["input_ids"]
    generated(parties.data_party.model, ids)
    probes.clear()
    assert torch.equal(
        generated(parties.data_party.model, ids.flip(1)), generated(parties.whole, ids.flip(1))
    )
    assert not probes


def test_tables_that_changed_under_a_form_met_before_are_looked_at_anew(cut, probes):
    parties = cut("llama")
    ids = tiny_batch(parties.whole)["input_ids"]
    generated(parties.data_party.model, ids)
    probes.clear()
    for model in (parties.data_party.model, parties.whole):
        model.model.rotary_emb.inv_freq.mul_(0.5)
    assert torch.equal(generated(parties.data_party.model, ids), generated(parties.whole, ids))
    assert probes


def test_a_position_that_is_not_the_next_is_no_usual_one(cut):
    """One new position that counts on is left out of the form of a call; any other is part of it."""
    parties = cut("llama")
    ids = tiny_batch(parties.whole)["input_ids"]
    met = parties.data_party.calls.dry_runs._met_with_past
    model, sizes = parties.data_party.model, []
    for next_position in (ids.shape[1], ids.shape[1], ids.shape[1] + 3):
        cached = {cache_argument(model): DynamicCache(config=parties.whole.config)}
        with torch.no_grad():
            model(ids, **cached)
            model(ids[:, :1], position_ids=torch.full((len(ids), 1), next_position), **cached)
        sizes.append(len(met))
    assert sizes == [1, 1, 2]


def test_the_recorder_holds_nothing_when_a_call_is_over(cut):
    parties = cut("llama")
    parties.data_party.model(**tiny_batch(parties.whole))
    recorder: Recorder = parties.data_party.calls.recorder
    assert not recorder._known
    assert not recorder._held
