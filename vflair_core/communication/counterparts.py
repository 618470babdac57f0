"""Modules that a defense puts behind the channel, described so that the model party can build them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vflair_core.communication.message import Crossing
from vflair_core.errors import DefenseError, ProtocolError, shown

KINDS: dict[str, type[nn.Module]] = {"linear": nn.Linear, "layer_norm": nn.LayerNorm}
OPTIONS = {
    "linear": ("in_features", "out_features", "bias"),
    "layer_norm": ("normalized_shape", "eps"),
}


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


def build(spec: Any, prefix: str, weights: dict[str, Tensor]) -> nn.Module:
    """Build one counterpart from its description and the weights that came under `prefix`.

    Raises:
        ProtocolError: The kind is not on the list, or the weights are not those that its options speak of.
    """
    match spec:
        case {"kind": str() as kind, "options": dict() as options} if kind in KINDS:
            pass
        case {"kind": kind}:
            raise ProtocolError(
                f"Counterpart {shown(kind)} is not on the list: {', '.join(KINDS)}."
            )
        case _:
            raise ProtocolError(f"A counterpart has a kind and options; {shown(spec)} came.")
    if set(options) != set(OPTIONS[kind]):
        raise ProtocolError(f"A counterpart {kind!r} has the options {', '.join(OPTIONS[kind])}.")
    state = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    expected = _shapes(kind, options)
    if {name: list(weight.shape) for name, weight in state.items()} != expected:
        raise ProtocolError(
            f"The weights of a counterpart {kind!r} must have the shapes {shown(expected)}."
        )
    if not all(weight.is_floating_point() for weight in state.values()):
        raise ProtocolError("The weights of a counterpart must be floating-point numbers.")
    with torch.device("meta"):  # its memory is that of the weights that came
        module: nn.Module = KINDS[kind](**options)
    module.load_state_dict(state, assign=True)
    return module.requires_grad_(False)


def _shapes(kind: str, options: dict[str, Any]) -> dict[str, list[int]]:
    """The weights that a module has, by its options."""
    if kind == "layer_norm":
        shape, eps = options["normalized_shape"], options["eps"]
        if not isinstance(shape, (list, tuple)) or not isinstance(eps, float) or not eps > 0:
            raise ProtocolError("A layer norm has a shape, and an eps more than 0.")
        return {"weight": list(shape), "bias": list(shape)}
    shape = [options["out_features"], options["in_features"]]
    return {"weight": shape, **({"bias": shape[:1]} if options["bias"] is True else {})}
