"""A run saved by both parties, and taken up again as if it had never stopped.

The model party writes first, so that a step whose data party's part exists is complete unless the model
party lost its own. Which step counts is agreed when a session is opened again: the last that both have.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from torch import Tensor
from torch.optim import Optimizer

from vflair_core.defenses.defense import Defense
from vflair_core.errors import CheckpointError, VflairError, shown
from vflair_core.parties.data_party.checkpoint import save_tokenizer
from vflair_core.parties.data_party.party import DataParty
from vflair_core.parties.data_party.releases import ReleaseCounts
from vflair_core.partition.checkpoint import (
    generators,
    optimizer_state,
    owned,
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
    verify_part,
)
from vflair_core.partition.part_checks import (
    attempt,
    check_alike,
    check_counts,
    check_optimizer,
    check_part,
    check_random,
)


def save_run(
    party: DataParty, optimizer: Optimizer | None, folder: Path, keep: int | None = None
) -> Path:
    """Let both parties write what the run needs to go on from the present step, and keep the last few only."""
    for path in steps_in(folder).values():
        if read_facts(path)["session"] != party.connection.session:
            raise CheckpointError(
                f"{folder} holds checkpoints of another run. Choose another folder, or go on with that run: "
                "FineTuning(...).load(folder)."
            )
    present = sorted({*steps_in(folder), party.step})
    kept = present if keep is None else present[-keep:]
    party.connection.request("save", meta={} if keep is None else {"keep": kept})
    save_tokenizer(folder, party.tokenizer)
    path = party.save_part(
        folder / step_name(party.step),
        {**optimizer_state(optimizer), **run_state(party)},
        optimizer=type(optimizer).__name__,
        exchanges=party.exchanges,
    )
    for step, old in steps_in(folder).items():
        if step not in kept:
            shutil.rmtree(old.parent)
    return path


def run_state(party: DataParty) -> dict[str, Tensor]:
    """What the data party's half of a run is made of beside its weights and optimizer: generators, defenses, counts."""
    extra = random_state()
    for number, defense in enumerate(party.defenses.each):
        if party.defenses.seeded:  # else it is never drawn again, and nobody should read it
            generator = party.defenses.generator_of(defense)
            extra[f"random/defense.{number}"] = generator.get_state()
        extra |= _defense_state(defense, number)
    return extra | {f"releases/{key}": value for key, value in party.calls.counts.state().items()}


def _defense_state(defense: Defense, number: int) -> dict[str, Tensor]:
    """All that a defense has learned and drawn, under its number."""
    state = {f"defense/{number}/state/{key}": value for key, value in defense.state().items()}
    private = defense.private_state().items()
    state |= {f"defense/{number}/private/{key}": value for key, value in private}
    learned = enumerate(defense.parameters())
    return state | {f"defense/{number}/weight/{n}": weight.detach() for n, weight in learned}


def load_run(
    party: DataParty, optimizer: Optimizer | None, spec: Mapping[str, Any], folder: Path
) -> int:
    """Put both parties where they were at the last step that both wrote, and return it.

    What the data party has is seen to be whole and to fit before the model party is asked.
    """
    parts = steps_in(folder)
    if not parts:
        raise CheckpointError(
            f"There is no checkpoint in {folder}: FineTuning.save(folder) writes one."
        )
    facts = {step: verify_part(path) for step, path in parts.items()}
    if len({fact.get("session") for fact in facts.values()}) > 1:
        raise CheckpointError(f"{folder} holds checkpoints of several runs; give each a folder.")
    for step, path in parts.items():
        if facts[step].get("step") != step:
            raise CheckpointError(
                f"{path} is of step {shown(facts[step].get('step'))}: the files are in each other's place."
            )
    taken = {step: TakenUp.of(party, optimizer, path) for step, path in sorted(parts.items())[-1:]}
    session = taken[max(facts)].facts["session"]
    again = session == party.connection.session
    step = resume_session(party, spec, session, sorted(facts))
    if step not in taken:
        taken[step] = TakenUp.of(party, optimizer, parts[step])
    taken[step].restore(party, again=again)
    restore_optimizer(optimizer, taken[step].tensors)
    return step


@frozen(eq=False)
class TakenUp:
    """The data party's part of a run, read and seen to fit, so that all of it can be restored."""

    path: Path
    facts: Mapping[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, party: DataParty, optimizer: Optimizer | None, path: Path) -> TakenUp:
        """Read a part; nothing is changed.

        Raises:
            CheckpointError: It is damaged, or of another model, cut, optimizer or of other defenses.
        """
        facts, tensors = read_part(path)
        check_part(facts, party.connection.fingerprint, optimizer, path, party="data_party")
        check_counts(facts, path, "step", "exchanges")
        check_alike(owned(party.model), plain_names(tensors), path)
        check_optimizer(optimizer, under(tensors, "optimizer/"), path)
        saved = {key: device for key, device in generators().items() if key in tensors}
        check_random(tensors, {"random/cpu": "cpu", **saved}, path)
        for number, defense in enumerate(party.defenses.each):
            _check_defense(party, defense, number, tensors, path)
        attempt(
            lambda: ReleaseCounts().load_state(under(tensors, "releases/")),
            f"{path} does not say what crossed of each example",
        )
        return cls(path, facts, tensors)

    def restore(self, party: DataParty, *, again: bool = False) -> None:
        """Give the data party the weights and the state of the run; `again`, if what it counts crossed in this run.

        What crossed has crossed: counts are not taken back, and noise without a seed is not drawn twice.
        """
        tensors = self.tensors
        restore(party.model, plain_names(tensors), self.path)
        if party.defenses.seeded:
            count = len(party.defenses.each)
            party.defenses.rewind([tensors[f"random/defense.{n}"] for n in range(count)])
        for number, defense in enumerate(party.defenses.each):
            _load_defense(defense, tensors, number)
        party.calls.counts.load_state(under(tensors, "releases/"), again=again)
        restore_random(tensors)
        party.go_on_from(self.facts["step"], self.facts["exchanges"])


def _load_defense(defense: Defense, tensors: dict[str, Tensor], number: int) -> None:
    defense.load_state(under(tensors, f"defense/{number}/state/"))
    defense.load_private_state(under(tensors, f"defense/{number}/private/"))
    with torch.no_grad():
        for n, weight in enumerate(defense.parameters()):
            weight.copy_(tensors[f"defense/{number}/weight/{n}"])


def _check_defense(
    party: DataParty, defense: Defense, number: int, tensors: dict[str, Tensor], path: Path
) -> None:
    """See that a defense takes its state, which only it can say: it is tried on a copy."""
    name = type(defense).__name__
    if party.defenses.seeded:
        if f"random/defense.{number}" not in tensors:
            raise CheckpointError(
                f"{path} was written by a data party whose noise came from the operating system, and this one's has a seed. "
                "Build it with seed=None."
            )
        device = str(party.defenses.generator_of(defense).device)
        check_random(tensors, {f"random/defense.{number}": device}, path)
    weights = {str(n): weight for n, weight in enumerate(defense.parameters())}
    saved = under(tensors, f"defense/{number}/weight/")
    check_alike(weights, saved, path, f"weights of {name}")
    try:
        trial = copy.deepcopy(defense)
    except Exception:  # noqa: BLE001 - what a defense holds cannot always be copied, and the digest says that this is what was written
        return
    attempt(
        lambda: _load_defense(trial, tensors, number),
        f"{path} has a state that {name} does not take. Build the defenses as they were",
    )


def resume_session(
    party: DataParty, spec: Mapping[str, Any], session: str, steps: list[int]
) -> int:
    """Take up the session of the checkpoint in place of the one that was opened afresh; return the step.

    Raises:
        ProtocolError: The model party has no part of any of these `steps`.
        CheckpointError: Its part is damaged or does not fit.
    """
    connection, fresh = party.connection, party.connection.session
    seq = connection.seq
    connection.session = session
    try:
        step: int = party.open(spec, resume=steps)["step"]
    except VflairError:
        connection.session = fresh
        raise
    if fresh != connection.session:
        connection.close_other(fresh, seq)
    return step
