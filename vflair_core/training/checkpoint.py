"""Which parts a party writes and reads, with what else must come back for a run to go on as if never stopped.

The model party writes first, so that a step whose data party's part exists is complete unless the model
party lost its own. Which step counts is agreed when a session is opened again: the last that both have.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vflair_core.errors import CheckpointError, ProtocolError
from vflair_core.partition.checkpoint import (
    adapter_facts,
    owned,
    read_facts,
    read_part,
    restore,
    write_part,
)

if TYPE_CHECKING:
    from vflair_core.parties.data_party.party import DataParty
    from vflair_core.parties.model_party.party import ModelParty
    from vflair_core.training.fine_tuning import FineTuning

DATA_FILE, MODEL_FILE, TOKENIZER = "data_party.safetensors", "model_party.safetensors", "tokenizer"
Tensors = dict[str, Tensor]


def save_data_party(party: DataParty, folder: Path, extra: Tensors, **more: Any) -> Path:
    """Write the data party's part."""
    model: Any = party.model
    config = json.loads(model.config.to_json_string(use_diff=False))
    facts = {
        "party": "data_party",
        "fingerprint": party.line.fingerprint,
        "session": party.line.session,
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


def save_model_party(party: ModelParty, folder: Path, extra: Tensors, **more: Any) -> Path:
    """Write the model party's part."""
    facts = {
        "party": "model_party",
        "fingerprint": party.fingerprint,
        "steps": party.steps,
        "adapter": adapter_facts(party.model),
        **more,
    }
    return write_part(folder / MODEL_FILE, {**owned(party.model), **extra}, facts)


# -- checkpoints of a run --------------------------------------------------------------------------------


def save_run(fine_tuning: FineTuning, folder: Path) -> Path:
    """Let both parties write what the run needs to go on from the present step."""
    party = fine_tuning.party
    for path in steps_in(folder).values():
        if read_facts(path)["session"] != party.line.session:
            raise CheckpointError(
                f"{folder} holds checkpoints of another run. Choose another folder, or go on with that run: "
                "FineTuning(...).load(folder)."
            )
    party.line.request("save", None, (), {})
    save_tokenizer(party, folder)
    extra = {**_optimizer_state(fine_tuning.optimizer), **_random_state()}
    for number, defense in enumerate(party.defenses.each):
        generator = party.defenses.generator_of(defense)
        extra[f"random/defense.{number}"] = generator.get_state()
        extra |= {f"defense/{number}/state/{k}": v for k, v in defense.state().items()}
        private = defense.private_state().items()
        extra |= {f"defense/{number}/private/{k}": v for k, v in private}
        learned = enumerate(defense.parameters())
        extra |= {f"defense/{number}/weight/{n}": weight for n, weight in learned}
    return save_data_party(
        party,
        folder / _step_name(party.step),
        extra,
        optimizer=type(fine_tuning.optimizer).__name__,
        exchanges=party._exchanges,
    )


def load_run(fine_tuning: FineTuning, folder: Path) -> int:
    """Put both parties where they were at the last step that both wrote, and return it."""
    party, there = fine_tuning.party, steps_in(folder)
    if not there:
        raise CheckpointError(
            f"There is no checkpoint in {folder}: FineTuning.save(folder) writes one."
        )
    facts = {step: read_facts(path) for step, path in there.items()}
    if len({fact["session"] for fact in facts.values()}) > 1:
        raise CheckpointError(f"{folder} holds checkpoints of several runs; give each a folder.")
    newest = facts[max(facts)]
    check_part(newest, party.line.fingerprint, fine_tuning.optimizer, there[max(facts)])
    step = _resume(fine_tuning, newest["session"], sorted(facts))
    _, tensors = read_part(there[step])
    restore(party.model, _plain_names(tensors), there[step])
    _restore_optimizer(fine_tuning.optimizer, tensors)
    for number, defense in enumerate(party.defenses.each):
        party.defenses.generator_of(defense).set_state(tensors[f"random/defense.{number}"])
        defense.load_state(_under(tensors, f"defense/{number}/state/"))
        defense.load_private_state(_under(tensors, f"defense/{number}/private/"))
        with torch.no_grad():
            for n, weight in enumerate(defense.parameters()):
                weight.copy_(tensors[f"defense/{number}/weight/{n}"])
    _restore_random(tensors)
    party.line.step, party._exchanges = step, facts[step]["exchanges"]
    return step


def _resume(fine_tuning: FineTuning, session: str, steps: list[int]) -> int:
    """Take up the session of the checkpoint in place of the one that was opened afresh."""
    line, fresh = fine_tuning.party.line, fine_tuning.party.line.session
    spec = fine_tuning.options.optimizer_spec()
    line.session = session
    try:
        step: int = line.open(fine_tuning.party.defenses.each, spec, resume=steps)["step"]
    except ProtocolError:
        line.session = fresh
        raise
    if fresh != session:
        line.session = fresh
        line.request("close", None, (), {})
        line.session = session
    return step


def save_session(party: ModelParty, session: str, step: int, optimizer: Any) -> Path:
    """Write the model party's part of a run, into the folder that its operator chose.

    Raises:
        ProtocolError: The operator chose none.
    """
    extra = {**_optimizer_state(optimizer), **_random_state()}
    folder = _run_folder(party, session) / _step_name(step)
    return save_model_party(party, folder, extra, step=step, optimizer=type(optimizer).__name__)


def load_session(party: ModelParty, session: str, steps: Any, optimizer: Any) -> int:
    """Put the model party where it was at the last of `steps` that it wrote for this session.

    Raises:
        ProtocolError: It wrote none of them.
    """
    there = steps_in(_run_folder(party, session), MODEL_FILE)
    common = saved_steps(party, session) & set(steps)
    if not common:
        raise ProtocolError(
            f"No step has the parts of both parties: the data party has {_listed(steps)}, the model party "
            f"{_listed(there)}. Give the model party the folder it wrote to (model_party.checkpoints), or "
            "start anew."
        )
    path = there[max(common)]
    facts, tensors = read_part(path)
    check_part(facts, party.fingerprint, optimizer, path)
    restore(party.model, _plain_names(tensors), path)
    _restore_optimizer(optimizer, tensors)
    _restore_random(tensors)
    party.steps.update(facts["steps"])
    return max(common)


def saved_steps(party: ModelParty, session: str) -> set[int]:
    """Steps of a session that the model party has a part of."""
    return set(steps_in(_run_folder(party, session), MODEL_FILE))


def check_part(facts: dict[str, Any], fingerprint: str, optimizer: Any, path: Path) -> None:
    """See that a part belongs to this model, cut and optimizer.

    Raises:
        CheckpointError: It does not.
    """
    from vflair_core.partition.fingerprint import differences

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
    found = {}
    for path in folder.glob(f"step-*/{file}"):
        if number := re.fullmatch(r"step-(\d+)", path.parent.name):
            found[int(number[1])] = path
    return found


def _step_name(step: int) -> str:
    return f"step-{step:08d}"


def _run_folder(party: ModelParty, session: str) -> Path:
    if party.checkpoints is None:
        raise ProtocolError(
            "The model party keeps no checkpoints. Its operator allows it: model_party.checkpoints = folder."
        )
    # The session's name came over the wire: it never names a path.
    return Path(party.checkpoints) / f"run-{hashlib.sha256(session.encode()).hexdigest()[:16]}"


def _listed(steps: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(steps))) or "none"


def _optimizer_state(optimizer: torch.optim.Optimizer | None) -> Tensors:
    state = optimizer.state_dict()["state"] if optimizer else {}
    return {
        f"optimizer/{index}/{key}": value
        for index, entries in state.items()
        for key, value in entries.items()
        if isinstance(value, Tensor)
    }


def _restore_optimizer(optimizer: torch.optim.Optimizer | None, tensors: Tensors) -> None:
    if optimizer is None:
        return
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _under(tensors, "optimizer/").items():
        index, _, key = name.partition("/")
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _random_state() -> Tensors:
    states = {"random/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        cards = enumerate(torch.cuda.get_rng_state_all())
        states |= {f"random/cuda.{n}": state for n, state in cards}
    return states


def _restore_random(tensors: Tensors) -> None:
    torch.set_rng_state(tensors["random/cpu"])
    for name, state in _under(tensors, "random/cuda.").items():
        if int(name) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, int(name))


def _under(tensors: Tensors, prefix: str) -> Tensors:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _plain_names(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if "/" not in name}
