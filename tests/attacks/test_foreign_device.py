"""The device that is not there refuses what CUDA refuses, and gives the CPU's values for all else."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from support.foreign_device import (
    DEVICES,
    Foreign,
    MixedDevicesError,
    device_called,
    foreign_device,
    same_attention,
)
from vflair_core import Partition
from vflair_core.attacks.halves import halves
from vflair_core.testing import tiny_model

ROWS = torch.arange(12.0).view(3, 4)
REFUSED = {
    "arithmetic": lambda far: far + ROWS,
    "arithmetic, the other way round": lambda far: ROWS * far,
    "in place": lambda far: ROWS.clone().add_(far),
    "a product": lambda far: far @ ROWS.T,
    "a comparison": lambda far: torch.where(ROWS > 3, far, 0.0),
    "whether they are equal": lambda far: torch.equal(far, ROWS),
    "putting together": lambda far: torch.cat([far, ROWS]),
    "stacking numbers": lambda far: torch.stack([far.sum(), ROWS.sum()]),
    "an index that is there, of what is here": lambda far: ROWS[far[0].long() % 3],
    "a mask that is there, of what is here": lambda far: ROWS[far > 3],
    "writing at an index": lambda far: far.index_put_((torch.tensor([0]),), ROWS[:1]),
    "gathering": lambda far: far.gather(1, torch.zeros(3, 1, dtype=torch.long)),
    "a layer": nn.Linear(4, 2),
    "an embedding": lambda far: nn.functional.embedding(torch.tensor([0]), far),
    "a loss": lambda far: nn.functional.cross_entropy(far, torch.tensor([0, 1, 2])),
    "a generator": lambda far: torch.randn(2, device=far.device, generator=torch.Generator()),
    "lengths": lambda far: pack_padded_sequence(far[..., None], far[0].long()[1:] + 1, True),
}


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("use", REFUSED.values(), ids=REFUSED)
def test_what_is_in_two_places_does_not_meet(use, name):
    with device_called(name) as device:
        far = ROWS.to(device)
        refusal = MixedDevicesError if name == "foreign" else (RuntimeError, IndexError)
        with pytest.raises(refusal):
            use(far)
        assert torch.equal(far.cpu(), ROWS)


@pytest.mark.parametrize("name", DEVICES)
def test_numpy_is_for_the_cpu(name):
    with device_called(name) as device:
        far = ROWS.to(device)
        with pytest.raises((RuntimeError, TypeError)):
            far.numpy()
        assert far.cpu().numpy().tolist() == ROWS.tolist()


ALLOWED = {
    "a number": lambda rows: rows * torch.tensor(2.0) + torch.tensor(1.0),
    "an index": lambda rows: rows[torch.tensor([2, 0])],
    "a mask": lambda rows: rows[torch.tensor([True, False, True])],
    "coming back": lambda rows: rows.cpu() + ROWS,
    "a slice written from elsewhere": lambda rows: ROWS.clone().index_copy(0, torch.tensor([0]), rows.cpu()[:1]),
    "type and place of another": lambda rows: torch.ones(3, 4, dtype=torch.long).to(rows) + rows,
    "a copy of it": lambda rows: copy.deepcopy(rows) + rows,
    "zeros like it": lambda rows: torch.zeros_like(rows) + rows.new_zeros(3, 4) + rows,
    "what is made there": lambda rows: rows + torch.arange(4, device=rows.device),
    "its numbers": lambda rows: torch.tensor([float(rows[0, 1]), *rows[2].tolist()]),
}  # fmt: skip


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("use", ALLOWED.values(), ids=ALLOWED)
def test_all_else_has_the_values_of_the_cpu(use, name):
    wanted = use(ROWS.clone())
    with device_called(name) as device:
        assert torch.equal(use(ROWS.to(device)).cpu(), wanted)


@pytest.mark.parametrize("name", DEVICES)
def test_a_slice_can_be_written_across(name):
    here = torch.zeros(2, 4)
    with device_called(name) as device:
        here[0, 1:] = ROWS.to(device)[1, 1:]
    assert here.tolist() == [[0, 5, 6, 7], [0, 0, 0, 0]]


@pytest.mark.parametrize("name", DEVICES)
def test_packed_rows_have_their_sizes_on_the_cpu(name):
    network = nn.GRU(4, 2, batch_first=True, bidirectional=True)
    rows = torch.randn(3, 5, 4)

    def through(network, rows):
        packed = pack_padded_sequence(rows, torch.tensor([5, 3, 1]), batch_first=True)
        return pad_packed_sequence(network(packed)[0], batch_first=True)[0]

    wanted = through(network, rows)
    with device_called(name) as device:
        found = through(copy.deepcopy(network).to(device), rows.to(device))
        found.sum().backward()
        assert torch.allclose(found.cpu(), wanted, atol=1e-6)


@pytest.mark.parametrize("name", DEVICES)
def test_an_optimizer_takes_the_same_steps(name):
    def trained(device):
        torch.manual_seed(0)
        network = nn.Linear(4, 2).to(device)
        optimizer = torch.optim.AdamW(network.parameters())
        for _ in range(3):
            optimizer.zero_grad()
            network(ROWS.to(device)).square().sum().backward()
            optimizer.step()
        return network.weight.detach().cpu()

    wanted = trained("cpu")
    with device_called(name) as device:
        assert torch.allclose(trained(device), wanted)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize("name", DEVICES)
def test_halves_are_moved_and_compute_there(kind, name):
    task = "classification" if kind == "bert" else "causal-lm"
    model, ids = tiny_model(kind, task), torch.arange(3, 12)[None]

    def values(device):
        head, tail = halves(model, Partition(1, 1), device)
        embeds = head.vectors()[ids.to(device)].requires_grad_()
        smashed = head(inputs_embeds=embeds)
        (slope,) = torch.autograd.grad(tail(smashed).square().sum(), embeds)
        assert head.device == tail.device == embeds.device == smashed.device
        return head(ids.to(device)), smashed, slope, torch.tensor(head.is_causal())

    with same_attention():
        wanted = values("cpu")
        with device_called(name) as device:
            for found, value in zip(values(device), wanted, strict=True):
                assert torch.allclose(found.cpu(), value, atol=1e-4)


def test_tied_weights_stay_tied():
    model = tiny_model("gpt2")
    with foreign_device() as device:
        model.to(device)
        assert isinstance(model.lm_head.weight, Foreign)
        assert model.lm_head.weight is model.transformer.wte.weight
