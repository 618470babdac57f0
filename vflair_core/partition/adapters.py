"""The adapters of peft in one model: which there are, what they are made of, and the weights without them."""

from __future__ import annotations

import copy
import importlib.util
import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from vflair_core.errors import CheckpointError, ExperimentError, VflairError
from vflair_core.partition.adapter_state import made_by_peft
from vflair_core.randomness import adapter_seed

if TYPE_CHECKING:
    from peft import PeftConfig


def check_peft() -> None:
    """See that peft is there, before something is loaded or computed for adapters.

    Raises:
        VflairError: It is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise VflairError(
            "Adapters, LoRA among them, need peft, which is not installed. Install the extra: "
            "pip install 'vflair-core[lora]'."
        )


def adapters_of(model: nn.Module) -> dict[str, Any]:
    """The configs of peft in `model`, by adapter."""
    return getattr(model, "peft_config", None) or {}


def is_of_adapter(model: nn.Module, name: str) -> bool:
    """Whether a weight of this name belongs to an adapter."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if made_by_peft(model.get_submodule(".".join(parts[:end]))):
            return parts[end] != "base_layer"
    return False


def adapter_facts(model: nn.Module) -> dict[str, Any] | None:
    """What a joined adapter needs to know: the config, and rank and scale of each adapted module.

    Raises:
        CheckpointError: There is more than one adapter.
    """
    configs = adapters_of(model)
    if not configs:
        return None
    if len(configs) > 1:
        raise CheckpointError(
            f"There are {len(configs)} adapters ({', '.join(configs)}), and a part holds one. Save with one."
        )
    ((name, config),) = configs.items()
    adapted = {
        path: {key: getattr(module, key, {}).get(name) for key in ("r", "lora_alpha")}
        for path, module in model.named_modules()
        if made_by_peft(module)
    }
    plain = {key: value for key, value in config.to_dict().items() if key != "runtime_config"}
    return {
        "name": name,
        "config": json.loads(json.dumps(plain, default=_plain)),
        "adapted": adapted,
    }


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of `model` with its adapters merged, under the names it has without them."""
    adapted = {name for name, module in model.named_modules() if made_by_peft(module)}
    state = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not any(name.startswith(f"{outer}.") for outer in adapted)
    }
    for outer in adapted:
        layer: Any = copy.deepcopy(model.get_submodule(outer))
        layer.merge()
        plain = layer.get_base_layer().state_dict()
        state.update({f"{outer}.{name}": tensor for name, tensor in plain.items()})
    return state


def inject_adapter(model: nn.Module, config: PeftConfig, seed: int, name: str = "default") -> None:
    """Let peft put its modules into `model`, each from a random stream of its own.

    Raises:
        ExperimentError: The method shares weights between layers.
    """
    from peft import PEFT_TYPE_TO_TUNER_MAPPING

    tuner: Any = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]  # type: ignore[index]
    if tuner.uses_shared_state:
        raise ExperimentError(
            f"{type(config).__name__} shares weights between layers, which two parties cannot. Use LoRA or another "
            "method that gives each layer its own."
        )

    def create(
        self: Any,
        own: Any,
        adapter: str,
        target: nn.Module,
        *args: Any,
        current_key: str,
        **options: Any,
    ) -> None:
        if hasattr(own, "fan_in_fan_out"):
            own.fan_in_fan_out = isinstance(target, Conv1D)  # GPT-2 holds its weights transposed
        with torch.random.fork_rng():
            torch.manual_seed(adapter_seed(seed, current_key))
            tuner._create_and_replace(
                self, own, adapter, target, *args, current_key=current_key, **options
            )

    type(tuner.__name__, (tuner,), {"_create_and_replace": create})(model, config, name)
