"""The optimizers both parties can build: an allow-list, so that a message never names code."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.trainer_pt_utils import get_parameter_names

from vflair_core.errors import ProtocolError

OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


# Weights that transformers' `Trainer` never decays; `exempt = true` asks for the same.
EXEMPT = (r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)")


def make_optimizer(
    model: nn.Module | Sequence[nn.Parameter], spec: Mapping[str, Any]
) -> torch.optim.Optimizer | None:
    """Build ``spec["name"]`` with the other entries as options; None when nothing is to be trained.

    Raises:
        ProtocolError: The name is not on the list, or an option is none of that optimizer.
    """
    options = dict(spec)
    name, exempt = options.pop("name"), options.pop("exempt", False)
    if name not in OPTIMIZERS:
        raise ProtocolError(f"Optimizer {name!r} is not on the list: {', '.join(OPTIMIZERS)}.")
    known = inspect.signature(OPTIMIZERS[name]).parameters
    if unknown := [key for key in options if key not in known or key == "params"]:
        raise ProtocolError(f"Optimizer {name!r} has no option {', '.join(unknown)}.")
    weights = list(model.parameters()) if isinstance(model, nn.Module) else list(model)
    trainable = [weight for weight in weights if weight.requires_grad]
    if not trainable:
        return None
    if not exempt or not isinstance(model, nn.Module):
        return OPTIMIZERS[name](trainable, **options)
    decayed = set(get_parameter_names(model, [nn.LayerNorm], list(EXEMPT)))
    named = [(key in decayed, weight) for key, weight in model.named_parameters()]
    groups = [
        {"params": [p for decays, p in named if decays and p.requires_grad]},
        {
            "params": [p for decays, p in named if not decays and p.requires_grad],
            "weight_decay": 0.0,
        },
    ]
    return OPTIMIZERS[name](groups, **options)
