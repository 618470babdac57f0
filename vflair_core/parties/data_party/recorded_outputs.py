"""What a model records of its blocks on demand and computes with: all of it would have to be here, and is not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from vflair_core.errors import PartitionError


def recorded_elsewhere(
    model: PreTrainedModel, absent: Iterable[nn.Module]
) -> dict[str, list[PretrainedConfig]]:
    """Name what the model records on demand and `absent` blocks would have to, each with the configs that may demand it.

    That is the routers' logits of a mixture of experts, of which it makes a loss. Hidden states and attention weights are not
    counted: no model computes with them, and whoever asks gets those of local blocks.
    """
    kinds = {type(module) for block in absent for module in block.modules()}
    found: dict[str, list[PretrainedConfig]] = {}
    for part in model.modules():
        if not isinstance(part, PreTrainedModel):
            continue
        for name, specs in (getattr(part, "_can_record_outputs", None) or {}).items():
            if name.endswith(("hidden_states", "attentions")):
                continue
            specs = specs if isinstance(specs, list) else [specs]
            if any(_means(spec, kind) for spec in specs for kind in kinds):
                found.setdefault(name, [model.config]).append(part.config)
    return found


def _means(spec: Any, kind: type) -> bool:
    """Whether an entry of `_can_record_outputs` means `kind`: a class, the end of its name, or an `OutputRecorder` of one."""
    target, name = getattr(spec, "target_class", spec), getattr(spec, "class_name", spec)
    if isinstance(target, type):
        return issubclass(kind, target)
    return isinstance(name, str) and kind.__name__.endswith(name)


def check_recorded(
    inputs: Mapping[str, Any], recorded: Mapping[str, Sequence[PretrainedConfig]]
) -> None:
    """See that a call demands nothing of what is `recorded` elsewhere.

    Raises:
        PartitionError: It does, by an argument or by the config.
    """
    for name, configs in recorded.items():
        flag = f"output_{name}"
        asked = inputs.get(flag)
        if any(getattr(config, flag, False) for config in configs) if asked is None else asked:
            raise PartitionError(
                f"{flag} is set, by the call or by the model's {type(configs[-1]).__name__}. The model would compute with the "
                f"{name} of all its blocks, and those of the model party's blocks are not here. With {flag} = False logits and "
                "the loss of the labels are the same, and the auxiliary loss is left out."
            )
