"""The pieces of a cell: the public phase, its arms, and the grades of each attack. Cells that share one share its work.

A piece is named by a hash of all that decides what it finds. An arm keeps its evidence in a folder, and attacks read it
there; so an arm is run once, however many attacks and defended arms go back to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import attrs
from attrs import frozen

from vflair_core.attacks.knowledge import names_of
from vflair_core.experiments.attack_phase import REFERENCES
from vflair_core.experiments.experiment import AttackSpec, Experiment
from vflair_core.experiments.shared_training import at_any_depth
from vflair_core.experiments.studies.environment import Environment, behind, hashed, of_arm

Kind = Literal["public", "arm", "grades"]


@frozen
class Piece:
    """Work that is done once.

    Attributes:
        kind: public: the public phase; arm: one arm up to its evidence; grades: one attack on an arm.
        key: Hash of all that decides what is found.
        experiment: What of the experiment decides it.
        arm: Which arm, of an arm and of grades.
        attack: The attack, of grades.
        reads: The arm that the grades are of.
        needs: Keys of pieces that must be done before.
        reference: Of grades of a defended arm: the grades of the same attack without a defense.
        trained: Of an arm whose fine-tuning is the same at every depth of the cut: hash of all that decides it.
    """

    kind: Kind
    key: str
    experiment: Experiment
    arm: str = ""
    attack: AttackSpec | None = None
    reads: str = ""
    needs: tuple[str, ...] = ()
    reference: str = ""
    trained: str = ""

    @property
    def about(self) -> dict[str, Any]:
        """What it is, for people and for estimates."""
        e = self.experiment
        model = e.model.name or str(e.model.config["model_type"])
        facts = {"task": e.task.name, "model": model, "arm": self.arm, "seed": e.seed}
        if REFERENCES.get(self.arm):  # it is compared with an arm without defenses
            facts["defenses"] = [attrs.asdict(spec) for spec in e.defenses]
        if self.attack is not None:
            facts["attack"] = attrs.asdict(self.attack)
        return facts


def pieces_of(e: Experiment, environment: Environment) -> list[Piece]:
    """The pieces of an experiment, each after those that it needs."""
    before: tuple[str, ...] = ()
    pieces: list[Piece] = []
    if e.pretrain.steps:
        public = _only_public(e)
        pieces.append(Piece("public", _key("public", public, environment), public))
        before = (pieces[0].key,)
    arms: dict[str, str] = {}
    graded: dict[tuple[str, int], str] = {}
    for arm in arms_of(e):
        part = _only_arm(e, arm)
        arms[arm] = _key("arm", part, environment, arm=arm)
        trained = _trained_key(part, environment) if arm == "undefended" else ""
        pieces.append(Piece("arm", arms[arm], part, arm, needs=before, trained=trained))
    for arm, number, attack, _ in launched(e):
        reference = graded.get((REFERENCES[arm], number), "")
        key = _graded_key(e, arms[arm], attack, reference, environment)
        graded[arm, number] = key
        needs = (arms[arm], reference) if reference else (arms[arm],)
        part = attrs.evolve(_only_arm(e, arm), attack_device=e.attack_device, isolation=e.isolation)
        pieces.append(Piece("grades", key, part, arm, attack, arms[arm], needs, reference))
    return pieces


def arm_piece(e: Experiment, environment: Environment, name: str) -> Piece:
    """The piece of one arm of an experiment."""
    each = (piece for piece in pieces_of(e, environment) if piece.kind == "arm")
    return next(piece for piece in each if piece.arm == name)


def arms_of(e: Experiment) -> list[str]:
    """The arms of an experiment, in the order in which they are run."""
    passive = ["undefended", "defended"] if e.defenses else ["undefended"]
    return passive + ([f"active-{arm}" for arm in passive] if e.adversary is not None else [])


def cell_key(e: Experiment, environment: Environment) -> str:
    """Hash of all that decides the numbers of a cell."""
    return hashed([piece.key for piece in pieces_of(e, environment)])


def launched(e: Experiment) -> Iterator[tuple[str, int, AttackSpec, tuple[str, ...]]]:
    """Each arm with the attacks on it and what each is granted; where an adversary was active, its own comes last."""
    for arm in arms_of(e):
        attacks = list(e.attacks)
        if arm.startswith("active") and e.adversary is not None:
            known = (*names_of(e.adversary.knowledge), "adversary_state")
            attacks.append(attrs.evolve(e.adversary, knowledge=known))
        for number, attack in enumerate(attacks):
            yield arm, number, attack, names_of(attack.knowledge)


def _only_public(e: Experiment) -> Experiment:
    """What decides the public phase, all else as by default."""
    train = attrs.evolve(type(e.train)(), packing=e.train.packing)
    return Experiment(
        task=e.task, model=e.model, seed=e.seed, pretrain=e.pretrain, threads=e.threads, train=train
    )


def _only_arm(e: Experiment, arm: str) -> Experiment:
    """What decides an arm: no attacks, and no defenses or adversary where it has none."""
    own: dict[str, Any] = {"attacks": (), "attack_device": "auto", "isolation": "process"}
    if arm.endswith("undefended"):
        own["defenses"] = ()
    else:
        own["check_unsplit"] = False
    if not arm.startswith("active"):
        own["adversary"] = None
    return attrs.evolve(e, **own)


def _key(
    kind: Kind | Literal["trained"], e: Experiment, environment: Environment, **more: str
) -> str:
    return hashed([kind, e.to_dict(), behind(environment, of_arm(e)), more])


def _trained_key(e: Experiment, environment: Environment) -> str:
    same = at_any_depth(e)
    return _key("trained", same, environment) if same is not None else ""


def _graded_key(
    e: Experiment, arm: str, attack: AttackSpec, reference: str, environment: Environment
) -> str:
    settings = [attrs.asdict(attack), environment["device"], e.isolation, e.threads]
    return hashed(["grades", arm, reference, settings, behind(environment, [("attacks", attack)])])


def without_threads(e: Experiment) -> Experiment:
    """One thread where an experiment leaves it open: how many there are decides the last bits of numbers."""
    return e if e.threads else attrs.evolve(e, threads=1)
