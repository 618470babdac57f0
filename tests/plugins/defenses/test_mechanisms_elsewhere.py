"""What an attacker is told of a defense follows her hidden states to the device where they are."""

from __future__ import annotations

import pytest
import torch

from support.foreign_device import DEVICES, device_called
from vflair_core.attacks.adaptive import rebuilt_mechanism
from vflair_core.defenses.defense import Defense
from vflair_core.offers import load_target, target_of
from vflair_defenses import vflair_defenses

WIDTH = 16
ON_GRADIENTS = {"gradient_clip": 1.0}
OPTIONS = {
    "gaussian-noise": {"gradient_multiplier": 1.0, **ON_GRADIENTS},
    "laplace-noise": {"gradient_epsilon": 1.0, **ON_GRADIENTS},
    "quantisation": {"gradients": True},
    "sparsification": {"gradients": True},
    "top-k": {"k": 4},
    "text-obfuscator": {"clusters": 5},
    "dual-bottleneck": {"steps": 1},
    "split-and-denoise": {"steps": 1},
    "label-randomised-response": {"epsilon": 0.0},
}
SIDES = ("mechanism", "gradient_mechanism")


def made(name):
    return load_target(vflair_defenses()[name])(**OPTIONS.get(name, {}))


EACH = [
    (name, side)
    for name in vflair_defenses()
    for side in SIDES
    if getattr(type(made(name)), side) is not getattr(Defense, side)
]


@pytest.fixture
def known(defended):
    """A function: the mechanism of a defense that was prepared, as an attacker builds it."""

    def build(name, side):
        defense = made(name)
        defended([defense])
        spec = {"target": target_of(defense), "options": OPTIONS.get(name, {})}
        state = {f"0.{key}": value for key, value in defense.state().items()}
        return lambda: rebuilt_mechanism([spec], side, state)

    return build


def values(mechanism, hidden, observed):
    """All that a mechanism says of hidden states, with the same random numbers."""
    stream = torch.Generator().manual_seed(1)
    return [
        mechanism.expected(hidden),
        mechanism.log_likelihood(observed, hidden),
        mechanism.sample(hidden, stream),
        mechanism.sample_embeddings(hidden, stream),
    ]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "side"), EACH)
def test_a_mechanism_says_there_what_it_says_here(name, side, device, known):
    build = known(name, side)
    hidden, observed = torch.randn(2, 3, 5, WIDTH)
    wanted = values(build(), hidden, observed)
    with device_called(device) as there, torch.no_grad():
        found = values(build(), hidden.to(there), observed.to(there))
        for value, here in zip(found, wanted, strict=True):
            assert value.device.type == "cuda"
            assert torch.allclose(value.cpu(), here, atol=1e-4)
