"""One party's part of a checkpoint on disk: what it owns and nothing else, in one safetensors file.

Weights lie under the names the whole model gives them, other state under ``optimizer/``, ``random/`` and
``defense/``. The facts that say where a part belongs are JSON in the file's metadata: no pickle.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vflair_core.errors import CheckpointError

Side = Literal["data_party", "model_party"]
KEY = "vflair_checkpoint"


def write_part(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Path:
    """Write a part. After a crash there is the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    copies = {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}
    unfinished = path.with_suffix(".part")
    save_file(copies, unfinished, metadata={KEY: json.dumps(facts)})
    _flush(unfinished)
    unfinished.replace(path)
    _flush(path.parent)
    return path


def _flush(path: Path) -> None:
    """Wait until the disk has it, so that a power cut leaves no name without its content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_facts(path: Path) -> dict[str, Any]:
    """Read the facts of a part, without its tensors.

    Raises:
        CheckpointError: The file is not a part of a checkpoint.
    """
    return _read(path, tensors=False)[0]


def read_part(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the facts and the tensors of a part.

    Raises:
        CheckpointError: The file is not a part of a checkpoint.
    """
    return _read(path, tensors=True)


def _read(path: Path, *, tensors: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            facts = (file.metadata() or {}).get(KEY)
            found = {key: file.get_tensor(key) for key in file.keys()} if tensors else {}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if facts is None:
        raise CheckpointError(
            f"{path} is not a party's part of a checkpoint: it lacks vflair's metadata. Give a folder that "
            "data_party.save or model_party.save wrote."
        )
    return json.loads(facts), found


def owned(model: nn.Module) -> dict[str, Tensor]:
    """Return what a party saves of its model: all weights, or, with adapters, adapters and what is trained.

    Raises:
        CheckpointError: The weights are quantised, and there are no adapters to save instead.
    """
    weights = dict(model.named_parameters())
    if adapters_of(model):
        weights = {
            name: weight
            for name, weight in weights.items()
            if weight.requires_grad or _of_adapter(model, name)
        }
    packed = [name for name, weight in weights.items() if not weight.is_floating_point()]
    if packed:
        raise CheckpointError(
            f"Quantised weights ({', '.join(packed[:3])}, …) are not saved in parts: they come from the "
            "checkpoint. Train adapters, which are saved without them."
        )
    kept = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    return {**weights, **buffers}


def restore(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Give `model` the values that `owned` took from one like it.

    Raises:
        CheckpointError: The names or shapes are others; nothing is changed.
    """
    there = owned(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in there.items()}
    saved = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wrong = sorted(
        name for name in shapes.keys() | saved.keys() if shapes.get(name) != saved.get(name)
    )
    if wrong:
        raise CheckpointError(
            f"{path} does not fit this model: {len(wrong)} weights are on one side only or of another shape, "
            f"{', '.join(wrong[:4])} among them. Build the model, its cut and its adapters as they were."
        )
    with torch.no_grad():
        for name, tensor in there.items():
            tensor.copy_(weights[name])


def adapters_of(model: nn.Module) -> dict[str, Any]:
    """The configs of peft in `model`, by adapter."""
    return getattr(model, "peft_config", None) or {}


def _of_adapter(model: nn.Module, name: str) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if isinstance(model.get_submodule(".".join(parts[:end])), BaseTunerLayer):
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
    from peft.tuners.tuners_utils import BaseTunerLayer

    ((name, config),) = configs.items()
    adapted = {
        path: {key: getattr(module, key, {}).get(name) for key in ("r", "lora_alpha")}
        for path, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    }
    plain = {key: value for key, value in config.to_dict().items() if key != "runtime_config"}
    return {
        "name": name,
        "config": json.loads(json.dumps(plain, default=_plain)),
        "adapted": adapted,
    }


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)
