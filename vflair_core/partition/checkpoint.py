"""One party's part of a checkpoint on disk: what it owns and nothing else, in one safetensors file.

Weights lie under the names the whole model gives them, other state under ``optimizer/``, ``random/`` and
``defense/``. The facts that say where a part belongs are JSON in the file's metadata: no pickle.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from attrs import frozen
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vflair_core.errors import CheckpointError
from vflair_core.partition.adapters import adapters_of, is_of_adapter
from vflair_core.partition.part_checks import check_alike
from vflair_core.partition.part_digest import METHOD, PartDigest

Side = Literal["data_party", "model_party"]
Tensors = dict[str, Tensor]
KEY, DIGEST = "vflair_checkpoint", "vflair_digest"
DATA_FILE, MODEL_FILE, TOKENIZER = "data_party.safetensors", "model_party.safetensors", "tokenizer"


def write_part(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Path:
    """Write a part, with its digest. After a crash there is the old file or the new one, never half of one.

    Raises:
        CheckpointError: The disk is full, or refuses; what was there before is there still.
    """
    text = json.dumps({**facts, "digest": METHOD})
    copies = {name: t.detach().cpu().clone().contiguous() for name, t in sorted(tensors.items())}
    digest = PartDigest(text)
    for name, tensor in copies.items():
        digest.add(name, tensor)
    unfinished = path.with_suffix(".part")
    there = path.parent.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(copies, unfinished, metadata={KEY: text, DIGEST: digest.text()})
        _flush(unfinished)
        unfinished.replace(path)
        _flush(path.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{called(path)} could not be written: {_reason(error)}. What was saved before is still there. Make room on the "
            "disk, or let the party write to the folder, and save again."
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)
        if not there and not path.exists():
            _remove_empty(path.parent)
    return path


def _remove_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:  # others put something in, or it was never made: it stays as it is
        return


def _flush(path: Path) -> None:
    """Wait until the disk has it, so that a power cut leaves no name without its content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def called(path: Path) -> Path:
    """A part as errors call it: those of the model party cross, and must not name the folders of its host."""
    return Path(path.parent.name, path.name) if path.name == MODEL_FILE else path


def _reason(error: Exception) -> str:
    """Why a file could not be read or written, without its name."""
    return (error.strerror if isinstance(error, OSError) else None) or type(error).__name__


def read_facts(path: Path) -> dict[str, Any]:
    """Read the facts of a part, without its tensors, and so without seeing whether it is whole.

    Raises:
        CheckpointError: The file is not a part of a checkpoint.
    """
    with _opened(path) as part:
        return part.facts


def read_part(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the facts and the tensors of a part.

    Raises:
        CheckpointError: The file is not a part of a checkpoint, or is damaged.
    """
    with _opened(path) as part:
        tensors = dict(part.verified())
    return part.facts, tensors


def verify_part(path: Path) -> dict[str, Any]:
    """See that a part is whole, holding one tensor at a time, and return its facts.

    Raises:
        CheckpointError: The file is not a part of a checkpoint, or is damaged.
    """
    with _opened(path) as part:
        for _ in part.verified():
            pass
    return part.facts


@frozen(eq=False)
class _Part:
    """A part that is being read."""

    file: Any
    path: Path
    text: str
    facts: dict[str, Any]
    written: str | None  # its digest

    def verified(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all tensors; the end is reached only if they are what was written."""
        digest = PartDigest(self.text)
        for name in sorted(self.file.keys()):
            tensor = self.file.get_tensor(name)
            digest.add(name, tensor)
            yield name, tensor
        if self.written is None and "digest" not in self.facts:
            warnings.warn(
                f"{called(self.path)} was written by an older version and has no digest: whether it is damaged cannot be "
                "seen. Save the run again.",
                stacklevel=4,
            )
        elif digest.text() != self.written:
            raise CheckpointError(
                f"{called(self.path)} is damaged: its content is not what was written (its digest is another). Nothing was "
                "loaded. Go on from another step: move this one away."
            )


def _are_facts(facts: Any) -> bool:
    """Whether these say where a part belongs."""
    match facts:
        case {"fingerprint": str(), "party": "data_party", "session": str(), "step": int()}:
            return True
        case {"fingerprint": str(), "party": "model_party", "steps": dict() as steps}:
            return all(type(step) is int and step >= 0 for step in steps.values())
        case _:
            return False


# What safetensors and torch raise of files that are damaged.
_DAMAGED = (
    OSError,
    SafetensorError,
    LookupError,
    TypeError,
    ValueError,
    RuntimeError,
    AttributeError,
)


@contextmanager
def _opened(path: Path) -> Iterator[_Part]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            text = metadata.get(KEY)
            if text is None:
                raise CheckpointError(
                    f"{called(path)} is not a party's part of a checkpoint: it lacks vflair's metadata. Give a folder that "
                    "data_party.save or model_party.save wrote."
                )
            facts = json.loads(text)
            if not _are_facts(facts):
                raise CheckpointError(
                    f"{called(path)} is damaged: its facts do not say whose part of which run and step it is."
                )
            yield _Part(file, path, text, facts, metadata.get(DIGEST))
    except _DAMAGED as error:
        raise CheckpointError(
            f"{called(path)} cannot be read: {_reason(error)}. It is damaged, or no part of a checkpoint; nothing was "
            "loaded."
        ) from error


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
        CheckpointError: The names, shapes or types are others; nothing is changed.
    """
    present = owned(model)
    check_alike(present, weights, path)
    with torch.no_grad():
        for name, tensor in present.items():
            tensor.copy_(weights[name])


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


def generators() -> dict[str, str]:
    """Torch's global generators as `random_state` names them, each with its device."""
    cards = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return {"random/cpu": "cpu", **{f"random/cuda.{n}": f"cuda:{n}" for n in cards}}


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
