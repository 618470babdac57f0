"""Weights on disk: each party saves only what it owns."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import nn


def save_weights(path: Path, model: nn.Module, fingerprint: str, step: int) -> Path:
    """Write the weights of `model`, beside the fingerprint of the cut and the step they belong to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: p.detach().cpu().clone().contiguous() for name, p in model.named_parameters()}
    unfinished = path.with_suffix(".part")
    facts = {"fingerprint": fingerprint, "step": step}
    save_file(weights, unfinished, metadata={"vflair_checkpoint": json.dumps(facts)})
    unfinished.replace(path)  # a crash leaves the old file or the new one, never half of one
    return path
