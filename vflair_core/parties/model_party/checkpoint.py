"""The model party's part of a checkpoint, and its half of a run that is resumed.

`steps` counts the steps that each session took on the weights.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from vflair_core.errors import CheckpointError, ProtocolError, shown
from vflair_core.parties.model_party.caps import Caps
from vflair_core.partition.adapters import adapter_facts
from vflair_core.partition.checkpoint import (
    MODEL_FILE,
    called,
    generators,
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
    under,
    write_part,
)
from vflair_core.partition.part_checks import (
    check_alike,
    check_counts,
    check_optimizer,
    check_part,
    check_random,
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
    caps: Caps,
    keep: list[int] | None = None,
) -> Path:
    """Write the model party's part of a run at a step; then drop those of steps that are not to be kept.

    Raises:
        ProtocolError: `keep` is no list of steps, or lacks the one at hand; or it would be more than `caps` allows.
    """
    steps_kept = isinstance(keep, list) and all(type(n) is int for n in keep)
    if keep is not None and not (steps_kept and step in keep):
        raise ProtocolError(f"'keep' must be steps, {step} among them; nothing was written.")
    tensors = {**owned(model), **optimizer_state(optimizer), **random_state()}
    _check_room(folder, step, tensors, caps, keep)
    run = {"step": step, "optimizer": type(optimizer).__name__, "run": folder.name}
    facts = _facts(model, fingerprint, steps) | run
    path = write_part(folder / step_name(step) / MODEL_FILE, tensors, facts)
    if keep is not None:
        for number, old in steps_in(folder, MODEL_FILE).items():
            if number not in keep:
                _remove(old.parent)
    return path


def _check_room(
    folder: Path, step: int, tensors: Mapping[str, Tensor], caps: Caps, keep: list[int] | None
) -> None:
    present = set(steps_in(folder, MODEL_FILE))
    after = {step} | (present if keep is None else present & set(keep))
    if len(after) > caps.saved_steps:
        raise ProtocolError(
            f"The model party keeps {caps.saved_steps} checkpoints of a run (its limit saved_steps), and has {len(present)}. "
            "Say which steps to keep (save_total_limit of the Trainer, keep=), or save less often."
        )
    on_disk = sum(path.stat().st_size for path in folder.parent.glob(f"*/step-*/{MODEL_FILE}"))
    if on_disk + sum(tensor.nbytes for tensor in tensors.values()) > caps.saved_bytes:
        raise ProtocolError(
            f"The checkpoints of all runs at the model party have {on_disk} bytes, and {caps.saved_bytes} are allowed (its "
            "limit saved_bytes). Its operator can delete old ones."
        )


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise CheckpointError(
            f"{folder.name}, which is not to be kept, could not be removed: {error.strerror}. The step at hand is saved."
        ) from error


def load_session(
    folder: Path, asked: list[int], model: nn.Module, fingerprint: str, optimizer: Optimizer | None
) -> tuple[int, dict[str, int]]:
    """Put the model party where it was at the last of the `asked` steps that it wrote; return that step and its `steps`.

    Raises:
        ProtocolError: It wrote none of them, or they are no steps.
        CheckpointError: It was written with another model, cut or optimizer, or is damaged; nothing is changed.
    """
    if not isinstance(asked, (list, tuple)) or not all(type(step) is int for step in asked):
        raise ProtocolError(f"'resume' must be a list of steps, not {shown(asked)}.")
    written = steps_in(folder, MODEL_FILE)
    common = set(written) & set(asked)
    if not common:
        raise ProtocolError(
            f"No step has the parts of both parties: the data party has {listed(asked)}, the model party "
            f"{listed(written)}. Give the model party the folder it wrote to (model_party.checkpoints), or "
            "start anew."
        )
    path = written[max(common)]
    facts, tensors = _checked(path, model, fingerprint, optimizer)
    restore(model, plain_names(tensors), path)
    restore_optimizer(optimizer, tensors)
    restore_random(tensors)
    return max(common), facts["steps"]


def check_saved(
    folder: Path,
    steps: Iterable[int],
    model: nn.Module,
    fingerprint: str,
    optimizer: Optimizer | None,
) -> None:
    """See that all parts of these steps could be restored; nothing is changed.

    Raises:
        CheckpointError: As `load_session`.
    """
    written = steps_in(folder, MODEL_FILE)
    for step in steps:
        _checked(written[step], model, fingerprint, optimizer)


def _checked(
    path: Path, model: nn.Module, fingerprint: str, optimizer: Optimizer | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    facts, tensors = read_part(path)
    _check(facts, tensors, model, fingerprint, optimizer, path)
    return facts, tensors


def _check(
    facts: Mapping[str, Any],
    tensors: dict[str, Tensor],
    model: nn.Module,
    fingerprint: str,
    optimizer: Optimizer | None,
    path: Path,
) -> None:
    """See that all of a part can be restored."""
    name = called(path)
    check_part(facts, fingerprint, optimizer, name, party="model_party")
    check_counts(facts, name, "step")
    run = facts.get("run", path.parents[1].name)
    if run != path.parents[1].name or step_name(facts["step"]) != path.parent.name:
        raise CheckpointError(
            f"{name} is of another run or step, {shown(run)} at {shown(facts.get('step'))}: the files are in each other's place."
        )
    check_alike(owned(model), plain_names(tensors), name)
    check_optimizer(optimizer, under(tensors, "optimizer/"), name)
    saved = {key: device for key, device in generators().items() if key in tensors}
    check_random(tensors, {"random/cpu": "cpu", **saved}, name)


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
