"""A run saved by both parties, and taken up again as if it had never stopped.

The model party writes first, so that a step whose data party's part exists is complete unless the model
party lost its own. Which step counts is agreed when a session is opened again: the last that both have.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from vflair_core.errors import CheckpointError, ProtocolError
from vflair_core.parties.data_party.checkpoint import save_tokenizer
from vflair_core.parties.data_party.party import DataParty
from vflair_core.partition.checkpoint import (
    check_part,
    optimizer_state,
    plain_names,
    random_state,
    read_facts,
    read_part,
    restore,
    restore_optimizer,
    restore_random,
    step_name,
    steps_in,
    under,
)


def save_run(party: DataParty, optimizer: Optimizer | None, folder: Path) -> Path:
    """Let both parties write what the run needs to go on from the present step."""
    for path in steps_in(folder).values():
        if read_facts(path)["session"] != party.connection.session:
            raise CheckpointError(
                f"{folder} holds checkpoints of another run. Choose another folder, or go on with that run: "
                "FineTuning(...).load(folder)."
            )
    party.connection.request("save")
    save_tokenizer(folder, party.tokenizer)
    return party.save_part(
        folder / step_name(party.step),
        {**optimizer_state(optimizer), **run_state(party)},
        optimizer=type(optimizer).__name__,
        exchanges=party.exchanges,
    )


def run_state(party: DataParty) -> dict[str, Tensor]:
    """What the data party's half of a run is made of beside its weights and optimizer: generators, defenses, counts."""
    extra = random_state()
    for number, defense in enumerate(party.defenses.each):
        generator = party.defenses.generator_of(defense)
        extra[f"random/defense.{number}"] = generator.get_state()
        extra |= {f"defense/{number}/state/{k}": v for k, v in defense.state().items()}
        private = defense.private_state().items()
        extra |= {f"defense/{number}/private/{k}": v for k, v in private}
        learned = enumerate(defense.parameters())
        extra |= {f"defense/{number}/weight/{n}": weight for n, weight in learned}
    return extra | {f"releases/{key}": value for key, value in party.calls.counts.state().items()}


def load_run(
    party: DataParty, optimizer: Optimizer | None, spec: Mapping[str, Any], folder: Path
) -> int:
    """Put both parties where they were at the last step that both wrote, and return it."""
    parts = steps_in(folder)
    if not parts:
        raise CheckpointError(
            f"There is no checkpoint in {folder}: FineTuning.save(folder) writes one."
        )
    facts = {step: read_facts(path) for step, path in parts.items()}
    if len({fact["session"] for fact in facts.values()}) > 1:
        raise CheckpointError(f"{folder} holds checkpoints of several runs; give each a folder.")
    newest = facts[max(facts)]
    check_part(newest, party.connection.fingerprint, optimizer, parts[max(facts)])
    step = resume_session(party, spec, newest["session"], sorted(facts))
    restore_optimizer(optimizer, take_up_run(party, parts[step], facts[step]))
    return step


def take_up_run(party: DataParty, path: Path, facts: Mapping[str, Any]) -> dict[str, Tensor]:
    """Give the data party the weights and the state of a run that a part holds; return all its tensors."""
    _, tensors = read_part(path)
    restore(party.model, plain_names(tensors), path)
    for number, defense in enumerate(party.defenses.each):
        party.defenses.generator_of(defense).set_state(tensors[f"random/defense.{number}"])
        defense.load_state(under(tensors, f"defense/{number}/state/"))
        defense.load_private_state(under(tensors, f"defense/{number}/private/"))
        with torch.no_grad():
            for n, weight in enumerate(defense.parameters()):
                weight.copy_(tensors[f"defense/{number}/weight/{n}"])
    party.calls.counts.load_state(under(tensors, "releases/"))
    restore_random(tensors)
    party.go_on_from(facts["step"], facts["exchanges"])
    return tensors


def resume_session(
    party: DataParty, spec: Mapping[str, Any], session: str, steps: list[int]
) -> int:
    """Take up the session of the checkpoint in place of the one that was opened afresh; return the step.

    Raises:
        ProtocolError: The model party has no part of any of these `steps`.
    """
    connection, fresh = party.connection, party.connection.session
    connection.session = session
    try:
        step: int = party.open(spec, resume=steps)["step"]
    except ProtocolError:
        connection.session = fresh
        raise
    if fresh != session:
        connection.session = fresh
        connection.request("close")
        connection.session = session
    return step
