"""What learned defenses share: first weights from a seed of their own, and weights as plain values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw first weights from `seed` and leave the global random state as it was."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        yield


def parameters_of(module: nn.Module) -> Sequence[nn.Parameter]:
    """The weights, for the data party's optimizer."""
    return tuple(module.parameters())


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """The weights by name, as copies."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def read_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Take weights that `state_of` returned."""
    module.load_state_dict(dict(state))


def perceptron(width: int, hidden: int, out: int) -> nn.Sequential:
    """Two layers with a tanh between them."""
    return nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, out))


def frozen_call(module: nn.Module, *inputs: Tensor | None, **options: bool) -> Tensor:
    """Call a module whose weights get no gradient, though its inputs do."""
    weights = {name: weight.detach() for name, weight in module.named_parameters()}
    found: Tensor = torch.func.functional_call(module, weights, inputs, options)
    return found
