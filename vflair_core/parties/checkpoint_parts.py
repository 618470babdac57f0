"""The parties' parts that fit each other: one model, one cut, one run, one step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from vflair_core.errors import CheckpointError
from vflair_core.partition.checkpoint import DATA_FILE, MODEL_FILE, read_facts, read_part, steps_in
from vflair_core.partition.fingerprint import differences


@frozen(eq=False)
class Parts:
    """The data party's part, and those of all model parties, that fit."""

    data_path: Path
    data: Mapping[str, Any]
    models: Sequence[Mapping[str, Any]]
    weights: Mapping[str, Tensor]  # of all

    @property
    def adapters(self) -> list[Mapping[str, Any]]:
        """What is known of the parties' adapters."""
        return [facts["adapter"] for facts in (self.data, *self.models) if facts["adapter"]]


def find_parts(data_folder: Path, model_folders: Sequence[Path]) -> Parts:
    """Read the parts of the last step that all folders hold.

    Raises:
        CheckpointError: There are none that fit; the message says why the latest do not.
    """
    ours = _candidates(data_folder, DATA_FILE, "data_party.save(folder)")
    theirs = [_candidates(f, MODEL_FILE, "model_party.save(folder)") for f in model_folders]
    reasons: list[str] = []
    for path, facts in ours:
        chosen = []
        for candidates in theirs:
            misfits = [_misfit(facts, other_facts) for _, other_facts in candidates]
            if None in misfits:
                chosen.append(candidates[misfits.index(None)])
            else:
                reasons.append(f"{path} and {candidates[0][0]} {misfits[0]}")
        if len(chosen) == len(theirs):
            paths = [path, *(other for other, _ in chosen)]
            return Parts(path, facts, [other_facts for _, other_facts in chosen], _union(paths))
    raise CheckpointError(
        f"No parts fit: {reasons[0]}. Merge what all parties saved at one step of one run."
    )


def _candidates(folder: Path, file: str, writer: str) -> list[tuple[Path, dict[str, Any]]]:
    """The parts in a folder, latest step first."""
    paths = [folder / file] if (folder / file).is_file() else list(steps_in(folder, file).values())
    paths = paths or sorted(folder.glob(f"run-*/step-*/{file}"))
    if not paths:
        raise CheckpointError(f"There is no {file} in {folder}: {writer} writes one.")
    parts = [(path, read_facts(path)) for path in paths]
    return sorted(parts, key=lambda pair: (pair[1].get("step") or 0, pair[0]), reverse=True)


def _misfit(data: Mapping[str, Any], model: Mapping[str, Any]) -> str | None:
    if (data["party"], model["party"]) != ("data_party", "model_party"):
        return (
            f"are parts of {data['party']} and {model['party']}; give the data party's folder first"
        )
    if data["fingerprint"] != model["fingerprint"]:
        return f"are of two models: {differences(data['fingerprint'], model['fingerprint'])}"
    step = model["steps"].get(data["session"], 0)
    if step != data["step"]:
        other = "" if data["session"] in model["steps"] else ", in which this run took none"
        return f"are of different steps: {data['step']} against {step}{other}"
    return None


def _union(paths: Sequence[Path]) -> dict[str, Tensor]:
    both: dict[str, Tensor] = {}
    for path in paths:
        weights = {k: v for k, v in read_part(path)[1].items() if "/" not in k}
        twice = [n for n in both.keys() & weights.keys() if not torch.equal(both[n], weights[n])]
        if twice:
            raise CheckpointError(
                f"{', '.join(sorted(twice)[:4])} is one weight of the whole model, held by two parties and "
                "trained apart: it cannot be joined."
            )
        both |= weights
    return both
