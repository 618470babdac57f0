"""What every defense owes: it holds on every message of every call, and switched off it is not there."""

from __future__ import annotations

import math

import pytest
import torch

from vflair_core.offers import load_target
from vflair_core.testing import assert_defense_contract
from vflair_defenses import OFFERED, vflair_defenses

# of each defense: options that defend, and options that switch it off (None: there are none)
CASES = {
    "gaussian-noise": (
        {"gradient_multiplier": 0.1, "gradient_clip": 1.0},
        {"noise_multiplier": 0.0, "clip": math.inf},
    ),
    "laplace-noise": (
        {"gradient_epsilon": 9.0, "gradient_clip": 1.0},
        {"epsilon": math.inf, "clip": math.inf},
    ),
    "sparsification": ({"gradients": True}, {"rate": 0.0, "gradients": True}),
    "top-k": ({"k": 4}, {"k": 0}),
    "quantisation": ({"gradients": True}, {"bits": 0, "gradients": True}),
    "permutation": ({}, None),
    "norm-matching": ({}, {"strength": 0.0}),
    "marvell": ({}, {"power": 0.0}),
    "label-randomised-response": ({"epsilon": 0.0}, {"epsilon": math.inf}),
    "zero-row-padding": ({}, {"scale": 0.0}),
    "decoy-rows": ({}, {"count": 0}),
    "mid": ({"decoder": "linear", "code": 4}, {"noise": 0.0}),
    "adversarial-training": ({}, {"weight": 0.0, "distortion": 0.0}),
    "nopeek": ({}, {"weight": 0.0}),
    "text-obfuscator": ({"clusters": 5}, {"epsilon": math.inf, "close": 0.0, "away": 0.0}),
    "dual-guard": ({"steps": 2, "retention": 0.1}, {"weight": 0.0}),
    "dual-bottleneck": ({"steps": 2}, {"noise": 0.0, "dissimilarity": 0.0}),
    "dx-noise": ({}, {"eta": math.inf}),
    "split-and-denoise": ({"steps": 3}, {"eta": math.inf, "clip": math.inf}),
    "dp-forward": ({}, {"epsilon": math.inf, "clip": math.inf}),
}
TEXT = {"santext", "santext-plus", "custext", "custext-plus", "rantext"}  # test_text_defenses.py
BY_EXAMPLE = {"gaussian-noise", "laplace-noise", "norm-matching"}  # they take gradients apart, and
# the gradient of T5's position bias, which the body hands on, is a sum over the batch


def wake(defense):
    """A mapping that starts as the identity defends only once it is trained: move it."""
    with torch.no_grad():
        defense.parameters()[-1].fill_(0.01)


def test_every_defense_that_is_offered_is_tested_here():
    assert set(CASES) | TEXT == set(OFFERED)


@pytest.mark.parametrize("name", CASES)
def test_a_defense_keeps_its_contract(name):
    defense = load_target(vflair_defenses()[name])
    options, off = CASES[name]
    assert_defense_contract(
        lambda: defense(**options),
        off=None if off is None else lambda: defense(**off),
        wake=wake if name == "adversarial-training" else lambda _: None,
        refuses={"t5"} if name in BY_EXAMPLE else (),
    )
