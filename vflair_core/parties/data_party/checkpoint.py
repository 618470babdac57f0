"""The data party's part of a checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from vflair_core.errors import CheckpointError
from vflair_core.partition.adapters import adapter_facts
from vflair_core.partition.checkpoint import DATA_FILE, TOKENIZER, owned, write_part


def save_data_party(
    folder: Path,
    model: Any,
    *,
    fingerprint: str,
    session: str,
    step: int,
    untied: Sequence[str],
    extra: Mapping[str, Tensor],
    **facts: Any,
) -> Path:
    """Write the data party's part: what it owns of `model`, `extra` tensors, and `facts`."""
    config = json.loads(model.config.to_json_string(use_diff=False))
    known = {
        "party": "data_party",
        "fingerprint": fingerprint,
        "session": session,
        "step": step,
        "architecture": type(model).__name__,
        "config": config,
        "generation": model.generation_config.to_dict() if model.can_generate() else None,
        "base": model.name_or_path,
        "untied": list(untied),
        "adapter": adapter_facts(model),
        **facts,
    }
    return write_part(folder / DATA_FILE, {**owned(model), **extra}, known)


def save_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Write the tokenizer beside the parts, once.

    Raises:
        CheckpointError: The disk is full, or refuses.
    """
    if tokenizer is None or (folder / TOKENIZER).exists():
        return
    unfinished = folder / f"{TOKENIZER}.part"
    try:
        tokenizer.save_pretrained(unfinished)
        unfinished.rename(folder / TOKENIZER)
    except OSError as error:
        raise CheckpointError(
            f"The tokenizer could not be written to {folder}: {error.strerror}. Make room on the disk, or let this "
            "process write there, and save again."
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
