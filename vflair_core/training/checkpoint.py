"""Which parts a party writes and reads, with what else must come back for a run to go on as if never stopped.

The model party writes first, so that a step whose data party's part exists is complete unless the model
party lost its own. Which step counts is agreed when a session is opened again: the last that both have.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vflair_core.errors import CheckpointError, ProtocolError
from vflair_core.partition.checkpoint import read_facts, read_part, restore

if TYPE_CHECKING:
    from vflair_core.training.fine_tuning import FineTuning
from vflair_core.parties.data_party.checkpoint import save_data_party, save_tokenizer
from vflair_core.partition.checkpoint import (
    check_part,
    optimizer_state,
    plain_names,
    random_state,
    restore_optimizer,
    restore_random,
    step_name,
    steps_in,
    under,
)

# -- checkpoints of a run --------------------------------------------------------------------------------


def save_run(fine_tuning: FineTuning, folder: Path) -> Path:
    """Let both parties write what the run needs to go on from the present step."""
    party = fine_tuning.party
    for path in steps_in(folder).values():
        if read_facts(path)["session"] != party.connection.session:
            raise CheckpointError(
                f"{folder} holds checkpoints of another run. Choose another folder, or go on with that run: "
                "FineTuning(...).load(folder)."
            )
    party.connection.request("save")
    save_tokenizer(party, folder)
    extra = {**optimizer_state(fine_tuning.optimizer), **random_state()}
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
        folder / step_name(party.step),
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
    check_part(newest, party.connection.fingerprint, fine_tuning.optimizer, there[max(facts)])
    step = _resume(fine_tuning, newest["session"], sorted(facts))
    _, tensors = read_part(there[step])
    restore(party.model, plain_names(tensors), there[step])
    restore_optimizer(fine_tuning.optimizer, tensors)
    for number, defense in enumerate(party.defenses.each):
        party.defenses.generator_of(defense).set_state(tensors[f"random/defense.{number}"])
        defense.load_state(under(tensors, f"defense/{number}/state/"))
        defense.load_private_state(under(tensors, f"defense/{number}/private/"))
        with torch.no_grad():
            for n, weight in enumerate(defense.parameters()):
                weight.copy_(tensors[f"defense/{number}/weight/{n}"])
    restore_random(tensors)
    party.connection.step, party._exchanges = step, facts[step]["exchanges"]
    return step


def _resume(fine_tuning: FineTuning, session: str, steps: list[int]) -> int:
    """Take up the session of the checkpoint in place of the one that was opened afresh."""
    party = fine_tuning.party
    connection, fresh = party.connection, party.connection.session
    spec = fine_tuning.options.optimizer_spec()
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
