"""What an attack reads is what it takes numbers or the form of, not what it is handed."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from vflair_core import Partition
from vflair_core.attacks.observables import Observables
from vflair_core.attacks.reading import Watched, noted, watched
from vflair_core.communication.transcript import Record
from vflair_core.testing import crossed, tiny_model


@pytest.fixture
def noted_seams():
    return []


@pytest.fixture
def seen(noted_seams):
    return watched(torch.arange(6.0).view(2, 3), "smashed", noted_seams.append)


@pytest.mark.parametrize(
    "take",
    [
        lambda x: x + 1,
        lambda x: x[0],
        lambda x: torch.stack([x, x]),
        lambda x: torch.nn.utils.rnn.pad_sequence([x, x]),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: torch.cdist(x, x),
        torch.nn.Parameter,
        lambda x: torch.where(condition=x > 1, input=x, other=x),
        copy.deepcopy,
        lambda x: pickle.loads(pickle.dumps(x)),
    ],
)
def test_whoever_takes_numbers_out_of_a_tensor_has_read_it(seen, noted_seams, take):
    take(seen)
    assert "smashed" in noted_seams


@pytest.mark.parametrize(
    "look",
    [
        lambda x: x.shape,
        len,
        lambda x: x.device,
        lambda x: x.new_zeros(3),
        torch.zeros_like,
        lambda x: torch.full_like(x, -1),
    ],
)
def test_whoever_looks_at_the_form_of_a_tensor_has_read_lengths_only(seen, noted_seams, look):
    look(seen)
    assert set(noted_seams) == {"lengths"}


def test_whoever_is_only_handed_a_tensor_has_read_nothing(seen, noted_seams):
    held = {"given": [seen, None]}
    assert held["given"][0] is not None
    assert isinstance(seen, torch.Tensor)
    assert noted_seams == []


def test_what_is_computed_is_what_it_would_be_and_is_an_ordinary_tensor(seen):
    plain = torch.arange(6.0).view(2, 3)
    for made, due in ((seen @ seen.T, plain @ plain.T), (seen.softmax(-1), plain.softmax(-1))):
        assert type(made) is torch.Tensor
        assert torch.equal(made, due)


def test_a_watched_tensor_can_be_optimised(seen):
    weight = torch.nn.Parameter(seen)
    optimizer = torch.optim.SGD([weight], lr=0.5)
    (weight**2).sum().backward()
    optimizer.step()
    assert torch.equal(torch.Tensor(weight.tolist()), torch.zeros(2, 3))  # x - 0.5 * 2x


def test_rounds_are_told_apart_by_role_and_stack(noted_seams):
    def record(exchange, role):
        about = (("forward", "sent"), role, "x", "train", 0, exchange)
        return Record(about[0][0], about[0][1], *about[1:], torch.ones(1, 2, 3))

    records = [record(n, role) for n in (1, 2) for role in ("smashed", "returned", "norms")]
    seen = Observables(records, victims=1)  # two exchanges of one victim: two stacks
    shown = noted("rounds", seen["rounds"], seen, noted_seams.append)
    assert [r.role for r in shown] == [r.role for r in records]
    assert noted_seams == []
    for number, due in enumerate(("smashed", "returned", None, "smashed 2", "returned 2", None)):
        noted_seams.clear()
        shown[number].tensor.sum()
        assert noted_seams == ([due] if due else [])


def test_an_attack_of_a_plugin_author_meets_watched_tensors_in_tests():
    model = tiny_model("gpt2")
    told = crossed(model, Partition(1, 1), [torch.arange(3, 9)] * 2, knowledge="K0")
    assert isinstance(told["smashed"], Watched)
    assert not isinstance(told["body"], Watched)
