"""The data party's part of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vflair_core.partition.adapters import adapter_facts
from vflair_core.partition.checkpoint import owned, write_part

if TYPE_CHECKING:
    from vflair_core.parties.data_party.party import DataParty
from vflair_core.partition.checkpoint import DATA_FILE, TOKENIZER, Tensors


def save_data_party(party: DataParty, folder: Path, extra: Tensors, **more: Any) -> Path:
    """Write the data party's part."""
    model: Any = party.model
    config = json.loads(model.config.to_json_string(use_diff=False))
    facts = {
        "party": "data_party",
        "fingerprint": party.connection.fingerprint,
        "session": party.connection.session,
        "step": party.step,
        "architecture": type(model).__name__,
        "config": config,
        "generation": model.generation_config.to_dict() if model.can_generate() else None,
        "base": model.name_or_path,
        "untied": list(party.untied),
        "adapter": adapter_facts(model),
        **more,
    }
    return write_part(folder / DATA_FILE, {**owned(model), **extra}, facts)


def save_tokenizer(party: DataParty, folder: Path) -> None:
    """Write the tokenizer beside the parts, once."""
    if party.tokenizer is None or (folder / TOKENIZER).exists():
        return
    unfinished = folder / f"{TOKENIZER}.part"
    party.tokenizer.save_pretrained(unfinished)
    unfinished.rename(folder / TOKENIZER)
