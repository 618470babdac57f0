"""The optimizers both parties can build: an allow-list, so that a message never names code.

A spec names one, with its options, and says which weights they hold for:

    {"name": "adamw", "lr": 1e-3, ...}                                      all weights alike
    {"name": "adamw", "groups": [{"lr": 1e-3, ...}, {...}], "exempt": True} those that transformers decays, the others
    {"name": "adamw", "groups": [{"weights": [names], "lr": 1e-3, ...}, ...]}
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers.trainer_pt_utils import get_parameter_names

from vflair_core.errors import ProtocolError, shown

SWITCHES = frozenset(
    "amsgrad maximize nesterov foreach fused capturable differentiable decoupled_weight_decay".split()  # noqa: SIM905
)
LARGEST = 1e4  # that an option, a learning rate or a scale may be: more ruins any weight
REFUSED = frozenset(["capturable", "differentiable"])  # of them
OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}

# Weights that transformers' `Trainer` never decays.
EXEMPT = (r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)")


def make_optimizer(
    model: nn.Module | Sequence[nn.Parameter], spec: Mapping[str, Any]
) -> Optimizer | None:
    """Build the optimizer of `spec` over what is trainable; None when that is nothing.

    Raises:
        ProtocolError: The name is not on the list, an option is none of that optimizer, or the groups do not
            hold each trainable weight once.
    """
    options = dict(spec)
    name, groups = options.pop("name"), options.pop("groups", None)
    exempt = options.pop("exempt", False)
    if name not in OPTIMIZERS:
        raise ProtocolError(f"Optimizer {shown(name)} is not on the list: {', '.join(OPTIMIZERS)}.")
    for each in (options, *(groups or ())):
        _check_names(name, each)
    weights = list(model.parameters()) if isinstance(model, nn.Module) else list(model)
    trainable = [weight for weight in weights if weight.requires_grad]
    if not trainable:
        return None
    if groups is None:
        return OPTIMIZERS[name](trainable, **options)
    if not isinstance(model, nn.Module):
        raise ProtocolError("Groups of weights are told apart by name: give the model.")
    divided = _by_decay(model) if exempt else _by_name(model, groups)
    if len(divided) != len(groups):
        raise ProtocolError(f"{len(groups)} groups of options came for {len(divided)} of weights.")
    told = ({k: v for k, v in group.items() if k != "weights"} for group in groups)
    return OPTIMIZERS[name](
        [{"params": own, **group} for own, group in zip(divided, told, strict=True)]
    )


def _check_names(name: str, options: Mapping[str, Any]) -> None:
    known = set(inspect.signature(OPTIMIZERS[name]).parameters) - {"params"} | {"weights"}
    if unknown := [str(key) for key in options if key not in known]:
        raise ProtocolError(f"Optimizer {name!r} has no option {', '.join(unknown)[:200]}.")
    _check_values(options)


def names_by_decay(model: nn.Module) -> tuple[list[str], list[str]]:
    """Names of the trainable weights that transformers' `Trainer` decays, and of those that it does not."""
    decayed = set(get_parameter_names(model, [nn.LayerNorm], list(EXEMPT)))
    trainable = [name for name, weight in model.named_parameters() if weight.requires_grad]
    return [n for n in trainable if n in decayed], [n for n in trainable if n not in decayed]


def _by_decay(model: nn.Module) -> list[list[nn.Parameter]]:
    weights = dict(model.named_parameters())
    return [[weights[name] for name in names] for names in names_by_decay(model)]


def _by_name(model: nn.Module, groups: Sequence[Mapping[str, Any]]) -> list[list[nn.Parameter]]:
    trainable = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    named = [name for group in groups for name in group["weights"]]
    if missing := sorted(trainable.keys() - set(named)):
        raise ProtocolError(
            f"{len(missing)} weights that are trained here are in no group of the optimizer, {missing[0]} among "
            "them. Choose what is trained first, then open the session."
        )
    if len(set(named)) != len(named):
        raise ProtocolError("A weight is in two groups of the optimizer.")
    return [[trainable[n] for n in group["weights"] if n in trainable] for group in groups]


def options_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The options of each group as they are now, in plain numbers that a message can carry.

    Raises:
        ProtocolError: One is none.
    """
    known = set(inspect.signature(type(optimizer)).parameters) - {"params"}
    return [
        {key: _plain(key, value) for key, value in group.items() if key in known}
        for group in optimizer.param_groups
    ]


def _plain(key: str, value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, (tuple, list)):
        return [_plain(key, each) for each in value]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    raise ProtocolError(f"The optimizer's option {key}={value!r} cannot be told to another party.")


def check_options(optimizer: Optimizer | None, told: Any) -> None:
    """See that `told` is a value for options of each group of an optimizer, whose step is then as safe as before.

    Raises:
        ProtocolError: It is not.
    """
    if not isinstance(told, (list, tuple)) or not all(isinstance(group, dict) for group in told):
        raise ProtocolError("'groups' must be a list of options for each group of the optimizer.")
    for group in told:
        _check_values(group)
    if optimizer is None:
        return
    if len(told) != len(optimizer.param_groups):
        raise ProtocolError(
            f"Options for {len(told)} groups came; the optimizer has {len(optimizer.param_groups)}."
        )
    for group, present in zip(told, optimizer.param_groups, strict=True):
        if unknown := [key for key in group if key not in present or key == "params"]:
            raise ProtocolError(f"The optimizer has no option {shown(unknown)}.")
        fixed = [k for k, v in group.items() if k in SWITCHES and bool(v) != bool(present[k])]
        if fixed:
            raise ProtocolError(
                f"{', '.join(fixed)} cannot be changed in a run: the optimizer keeps other states for it. Open the session anew."
            )


def _check_values(options: Mapping[Any, Any]) -> None:
    for key, value in options.items():
        fits = key == "weights" or (
            isinstance(value, (bool, NoneType))
            if key in SWITCHES
            else _are_betas(value)
            if key == "betas"
            else _is_amount(value) and (value > 0 or key != "eps")
        )
        if not fits:
            raise ProtocolError(
                f"The optimizer's option {shown(key)} cannot be {shown(value)}: numbers are >= 0 and at most {LARGEST:g}, betas two numbers "
                "below 1, eps more than 0, switches true or false."
            )
        if key in REFUSED and value:
            raise ProtocolError(
                f"The optimizer's option {key} says how torch computes a step, and the model party does not take it."
            )


def _is_amount(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= LARGEST


def _are_betas(value: Any) -> bool:
    pair = isinstance(value, (list, tuple)) and len(value) == 2
    return pair and all(_is_amount(each) and each < 1 for each in value)


def set_options(optimizer: Optimizer, told: Sequence[Mapping[str, Any]]) -> None:
    """Give each group the options that were `told` for it."""
    for group, options in zip(optimizer.param_groups, told, strict=True):
        for key, value in options.items():
            group[key] = tuple(value) if isinstance(value, list) else value
