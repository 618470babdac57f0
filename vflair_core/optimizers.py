"""The optimizers both parties can build: an allow-list, so that a message never names code."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from vflair_core.errors import ProtocolError

OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def make_optimizer(
    parameters: Iterable[nn.Parameter], spec: Mapping[str, Any]
) -> torch.optim.Optimizer | None:
    """Build ``spec["name"]`` with the other entries as options; None when nothing is to be trained.

    Raises:
        ProtocolError: The name is not on the list.
    """
    options = dict(spec)
    name = options.pop("name")
    if name not in OPTIMIZERS:
        raise ProtocolError(f"Optimizer {name!r} is not on the list: {', '.join(OPTIMIZERS)}.")
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    return OPTIMIZERS[name](trainable, **options) if trainable else None
