"""The model party's part of a checkpoint, and its half of a run that is resumed.

`steps` counts the steps that each session took on the weights.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from vflair_core.errors import ProtocolError
from vflair_core.partition.adapters import adapter_facts
from vflair_core.partition.checkpoint import (
    MODEL_FILE,
    check_part,
    listed,
    optimizer_state,
    owned,
    plain_names,
    random_state,
    read_part,
    restore,
    restore_optimizer,
    restore_random,
    step_name,
    steps_in,
    write_part,
)


def save_model_party(
    folder: Path, model: nn.Module, fingerprint: str, steps: Mapping[str, int]
) -> Path:
    """Write the model party's part."""
    return write_part(folder / MODEL_FILE, owned(model), _facts(model, fingerprint, steps))


def save_session(
    folder: Path,
    step: int,
    model: nn.Module,
    fingerprint: str,
    steps: Mapping[str, int],
    optimizer: Optimizer | None,
    *,
    keep: list[int] | None = None,
) -> Path:
    """Write the model party's part of a run at a step; then drop those of steps that are not to be kept.

    Raises:
        ProtocolError: `keep` is no list of steps, or lacks the one at hand.
    """
    if keep is not None and not (all(type(n) is int for n in keep) and step in keep):
        raise ProtocolError(f"'keep' must be steps, {step} among them; nothing was written.")
    tensors = {**owned(model), **optimizer_state(optimizer), **random_state()}
    run = {"step": step, "optimizer": type(optimizer).__name__}
    facts = _facts(model, fingerprint, steps) | run
    path = write_part(folder / step_name(step) / MODEL_FILE, tensors, facts)
    if keep is not None:
        for number, old in steps_in(folder, MODEL_FILE).items():
            if number not in keep:
                shutil.rmtree(old.parent)
    return path


def load_session(
    folder: Path, asked: list[int], model: nn.Module, fingerprint: str, optimizer: Optimizer | None
) -> tuple[int, dict[str, int]]:
    """Put the model party where it was at the last of the `asked` steps that it wrote; return that step and its `steps`.

    Raises:
        ProtocolError: It wrote none of them.
        CheckpointError: It was written with another model, cut or optimizer.
    """
    written = steps_in(folder, MODEL_FILE)
    common = set(written) & set(asked)
    if not common:
        raise ProtocolError(
            f"No step has the parts of both parties: the data party has {listed(asked)}, the model party "
            f"{listed(written)}. Give the model party the folder it wrote to (model_party.checkpoints), or "
            "start anew."
        )
    path = written[max(common)]
    facts, tensors = read_part(path)
    check_part(facts, fingerprint, optimizer, path)
    restore(model, plain_names(tensors), path)
    restore_optimizer(optimizer, tensors)
    restore_random(tensors)
    return max(common), facts["steps"]


def saved_steps(folder: Path) -> set[int]:
    """Steps of a session that the model party has a part of."""
    return set(steps_in(folder, MODEL_FILE))


def run_folder(checkpoints: str | Path | None, session: str) -> Path:
    """Return where the run of a session lies, in the folder that the model party's operator chose.

    Raises:
        ProtocolError: The operator chose none.
    """
    if checkpoints is None:
        raise ProtocolError(
            "The model party keeps no checkpoints. Its operator allows it: model_party.checkpoints = folder."
        )
    # The session's name came over the wire: it never names a path.
    return Path(checkpoints) / f"run-{hashlib.sha256(session.encode()).hexdigest()[:16]}"


def _facts(model: nn.Module, fingerprint: str, steps: Mapping[str, int]) -> dict[str, Any]:
    return {
        "party": "model_party",
        "fingerprint": fingerprint,
        "steps": dict(steps),
        "adapter": adapter_facts(model),
    }
