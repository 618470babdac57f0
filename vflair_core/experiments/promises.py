"""What an arm says of itself beside its grades: what was promised, and texts beside what was recovered of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch

from vflair_core.defenses.defense import Defense
from vflair_core.experiments.context import RunContext
from vflair_core.experiments.grading.grades import Grade
from vflair_core.experiments.grading.truth import Truth
from vflair_core.experiments.honesty import company_check, mechanism_check
from vflair_core.tasks.tokenization import InputFormat

if TYPE_CHECKING:
    from vflair_core.parties.data_party.party import DataParty
    from vflair_core.parties.data_party.releases import Releases


def samples_of(grades: list[Grade], truth: Truth) -> list[dict[str, Any]]:
    """Private texts beside what each attack made of them."""
    return [
        {"attack": grade.attack, "private": truth.texts[n], "recovered": text}
        for grade in grades
        for n, text in enumerate(grade.recovered)
    ]


def promises_of(
    defenses: list[Defense],
    party: DataParty,
    setting: RunContext,
    reading: InputFormat,
) -> dict[str, Any]:
    """What the defenses guarantee and cover, of how much that crossed, and how many examples were read."""
    releases, crossed = (
        party.releases,
        party.crossed,
    )  # before defenses are looked at, which crosses
    for defense in defenses:  # what they are looked at with depends on nothing that crossed before
        party.defenses.begin_anew(defense)
    return {
        "guarantees": [
            {"defense": spec.name, **_promise(defense, releases)}
            for spec, defense in zip(setting.experiment.defenses, defenses, strict=False)
        ],
        "findings": _found(defenses, party, setting),
        **_looked_at(party, setting),
        "covers": sorted({place for defense in defenses for place in defense.covers}),
        "releases_per_example": releases.rows,
        "messages_per_example": releases.messages,
        "gradients_per_example": releases.gradients,
        "crossed": crossed,
        "read": {"examples": reading.tally.examples, "cut": reading.tally.truncated},
    }


def _found(defenses: list[Defense], party: DataParty, setting: RunContext) -> list[dict[str, Any]]:
    """What the defenses measured of themselves on public text; the run goes on as if they had not."""
    with torch.random.fork_rng():
        each = [defense.findings(setting.task.public, party) for defense in defenses]
    pairs = zip(setting.experiment.defenses, each, strict=False)
    return [{"defense": spec.name, **found} for spec, found in pairs if found]


def _looked_at(party: DataParty, setting: RunContext) -> dict[str, Any]:
    """Whether defenses do what they say, and to a text alone what they do to a batch."""
    if not party.defenses.each:
        return {"mechanism": None, "company": None}
    training = setting.experiment.victims.phase == "train"
    checks = {"mechanism": mechanism_check, "company": company_check}
    with torch.random.fork_rng():
        return {
            name: check(party, setting.task.public, training=training)
            for name, check in checks.items()
        }


def _promise(defense: Defense, releases: Releases) -> dict[str, Any]:
    promised = defense.guarantee(releases.rows, releases.messages, releases.gradients)
    if promised.mechanism is not None:
        promised = attrs.evolve(
            promised, randomness="seeded by the experiment and the private text"
        )
    return promised.to_dict()
