"""One party's part of a checkpoint on disk: what it owns and nothing else, in one safetensors file.

Weights lie under the names the whole model gives them, other state under ``optimizer/``, ``random/`` and
``defense/``. The facts that say where a part belongs are JSON in the file's metadata: no pickle.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vflair_core.errors import CheckpointError
from vflair_core.partition.adapters import adapters_of, is_of_adapter
from vflair_core.partition.fingerprint import differences

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
            tensors_by_name = {key: file.get_tensor(key) for key in file.keys()} if tensors else {}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if facts is None:
        raise CheckpointError(
            f"{path} is not a party's part of a checkpoint: it lacks vflair's metadata. Give a folder that "
            "data_party.save or model_party.save wrote."
        )
    return json.loads(facts), tensors_by_name


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
            if weight.requires_grad or is_of_adapter(model, name)
        }
    packed = [name for name, weight in weights.items() if not weight.is_floating_point()]
    if packed:
        raise CheckpointError(
            f"Quantised weights ({', '.join(packed[:3])}, …) are not saved in parts: they come from the "
            "checkpoint. Train adapters, which are saved without them."
        )
    persistent = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    return {**weights, **buffers}


def restore(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Give `model` the values that `owned` took from one like it.

    Raises:
        CheckpointError: The names or shapes are others; nothing is changed.
    """
    present = owned(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in present.items()}
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
        for name, tensor in present.items():
            tensor.copy_(weights[name])


DATA_FILE, MODEL_FILE, TOKENIZER = "data_party.safetensors", "model_party.safetensors", "tokenizer"


Tensors = dict[str, Tensor]


def check_part(facts: dict[str, Any], fingerprint: str, optimizer: Any, path: Path) -> None:
    """See that a part belongs to this model, cut and optimizer.

    Raises:
        CheckpointError: It does not.
    """
    if facts["fingerprint"] != fingerprint:
        raise CheckpointError(
            f"{path} is of another model or cut: it has {differences(facts['fingerprint'], fingerprint)} now. "
            "Load the model, revision and partition it was trained with."
        )
    now = type(optimizer).__name__
    if facts.get("optimizer") != now:
        raise CheckpointError(
            f"{path} was saved with the optimizer {facts.get('optimizer')}, and now it is {now}. Go on with "
            "the same Train(optimizer=...)."
        )


def steps_in(folder: Path, file: str = DATA_FILE) -> dict[int, Path]:
    """The parts in a folder by step; unfinished ones have another name."""
    parts = {}
    for path in folder.glob(f"step-*/{file}"):
        if number := re.fullmatch(r"step-(\d+)", path.parent.name):
            parts[int(number[1])] = path
    return parts


def step_name(step: int) -> str:
    """The folder of a step."""
    return f"step-{step:08d}"


def listed(steps: Iterable[int]) -> str:
    """Steps as an error shows them."""
    return ", ".join(map(str, sorted(steps))) or "none"


def optimizer_state(optimizer: torch.optim.Optimizer | None) -> Tensors:
    """The tensors of an optimizer, by the number of the weight and the name of the value."""
    state = optimizer.state_dict()["state"] if optimizer else {}
    return {
        f"optimizer/{index}/{key}": value
        for index, entries in state.items()
        for key, value in entries.items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(optimizer: torch.optim.Optimizer | None, tensors: Tensors) -> None:
    """Give an optimizer the tensors that `optimizer_state` took."""
    if optimizer is None:
        return
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in under(tensors, "optimizer/").items():
        index, _, key = name.partition("/")
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def random_state() -> Tensors:
    """The state of torch's global generators."""
    states = {"random/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        cards = enumerate(torch.cuda.get_rng_state_all())
        states |= {f"random/cuda.{n}": state for n, state in cards}
    return states


def restore_random(tensors: Tensors) -> None:
    """Take up the state that `random_state` took."""
    torch.set_rng_state(tensors["random/cpu"])
    for name, state in under(tensors, "random/cuda.").items():
        if int(name) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, int(name))


def under(tensors: Tensors, prefix: str) -> Tensors:
    """The tensors whose names begin with `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def plain_names(tensors: Tensors) -> Tensors:
    """The weights among the tensors of a part: other state has a slash in its name."""
    return {name: tensor for name, tensor in tensors.items() if "/" not in name}
