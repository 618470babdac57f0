"""Modules that a defense puts behind the channel, described so that the model party can build them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vflair_core.communication.message import Crossing
from vflair_core.errors import DefenseError, ProtocolError

KINDS: dict[str, type[nn.Module]] = {"linear": nn.Linear, "layer_norm": nn.LayerNorm}


def describe(
    modules: Sequence[tuple[str, nn.Module]],
) -> tuple[list[dict[str, Any]], list[Crossing]]:
    """Return the descriptions of the modules that defenses, by name, ask for, in order, and their weights.

    Raises:
        DefenseError: A counterpart is of a kind the model party does not build.
    """
    descriptions, weights = [], []
    for number, (name, module) in enumerate(modules):
        match module:
            case nn.Linear():
                options: dict[str, Any] = {
                    "in_features": module.in_features,
                    "out_features": module.out_features,
                    "bias": module.bias is not None,
                }
                kind = "linear"
            case nn.LayerNorm():
                options = {"normalized_shape": list(module.normalized_shape), "eps": module.eps}
                kind = "layer_norm"
            case _:
                raise DefenseError(
                    f"{name} asks the model party for a {type(module).__name__}. "
                    "It builds nn.Linear and nn.LayerNorm."
                )
        descriptions.append({"kind": kind, "options": options})
        weights += [
            Crossing(f"{number}.{key}", "counterpart", value.detach())
            for key, value in module.state_dict().items()
        ]
    return descriptions, weights


def build(spec: dict[str, Any], prefix: str, weights: dict[str, Tensor]) -> nn.Module:
    """Build one counterpart from its description and the weights that came under `prefix`.

    Raises:
        ProtocolError: The kind is not on the list.
    """
    kind = spec["kind"]
    if kind not in KINDS:
        raise ProtocolError(f"Counterpart {kind!r} is not on the list: {', '.join(KINDS)}.")
    state = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    # No memory for what the options claim, only for the weights that came.
    with torch.device("meta"):
        module: nn.Module = KINDS[kind](**spec["options"])
    module.load_state_dict(state, assign=True)
    return module.requires_grad_(False)
