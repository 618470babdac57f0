"""What both parties must agree on: the architecture, the weights it started from, and the cut.

A fingerprint is one line of text that crosses at the first message, so that an error can say which part
differs. Weights are named by the commit of a hub model, by a digest of the files of a folder, or, for a
model that was split in memory, by a digest of a sample of each weight.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vflair_core.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from vflair_core.partition.partition import Partition

SAMPLE = 1024  # values of each weight: another training run changes nearly all of them
# Facts of the folder or of one party's way of loading, not of the architecture.
LOCAL = frozenset({"transformers_version", "quantization_config", "dtype", "torch_dtype"})
NO_WEIGHTS = "{folder} holds no weights. Needed: model.safetensors, or its shards and their index."


def fingerprint(
    architecture: str,
    config: PretrainedConfig,
    partition: Partition,
    weights: str,
    *,
    dtype: torch.dtype | str | None = None,
) -> str:
    """Return the line that both parties must agree on."""
    facts = {key: value for key, value in config.to_dict().items() if key not in LOCAL}
    facts = {key: value for key, value in facts.items() if not key.startswith("_")}
    parts = {
        "model": architecture,
        "config": _digest(json.dumps(facts, sort_keys=True, default=str).encode()),
        "weights": weights,
        "dtype": str(dtype).removeprefix("torch."),
        "head": partition.head,
        "tail": partition.tail,
        "disclose": ",".join(partition.disclosing),
    }
    return "; ".join(f"{key}={value}" for key, value in parts.items())


def weights_in(line: str) -> str:
    """Return what a fingerprint says about the weights."""
    facts = dict(part.split("=", 1) for part in line.split("; "))
    return facts["weights"]


def differences(theirs: Any, ours: str) -> str:
    """Say which parts of two fingerprints differ: ``head=1 against head=2``."""
    if not isinstance(theirs, str) or theirs.count(";") != ours.count(";"):
        return f"{theirs!s:.80} against {ours}"
    pairs = zip(theirs.split("; "), ours.split("; "), strict=False)
    return ", ".join(f"{a:.80} against {b}" for a, b in pairs if a != b)


def sample_digest(model: nn.Module) -> str:
    """Name the weights of a model in memory by a sample of each."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        if parameter.device.type != "meta":
            values = parameter.detach().reshape(-1)
            values = values[:: max(1, values.numel() // SAMPLE)]
            digest.update(values.double().cpu().numpy().tobytes())
    return f"sample:{digest.hexdigest()[:16]}"


def files_digest(folder: Path, variant: str | None = None) -> str:
    """Name the weights in a folder by the content of the files that hold them.

    Raises:
        CheckpointError: There are none, or some of them are missing.
    """
    digest = hashlib.sha256()
    for file in _weight_files(folder, f".{variant}" if variant else ""):
        try:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        except OSError as error:
            raise CheckpointError(
                f"{file}, which holds weights of the model in {folder}, cannot be read: {error.strerror}. Copy or download the "
                "folder again."
            ) from error
    return f"files:{digest.hexdigest()[:16]}"


def _weight_files(folder: Path, variant: str) -> list[Path]:
    """The files that `from_pretrained` would read, in its order of preference."""
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        whole = folder / f"{stem}{variant}{suffix}"
        index = folder / f"{stem}{suffix}.index{variant}.json"
        if whole.is_file():
            return [whole]
        if index.is_file():
            try:
                names = json.loads(index.read_text())["weight_map"].values()
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(
                    f"{index} does not say which weights lie in which file: {error}. Copy or download the folder again."
                ) from error
            return [folder / name for name in sorted(set(names))]
    raise CheckpointError(NO_WEIGHTS.format(folder=folder))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
