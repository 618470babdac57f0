"""What makes an attack adaptive: told of a mapping it sees through it, and not told it does not.

To ask for a mechanism is no proof of using it. So each attack that asked is tried once more, on what the victims sent
with the defenses bypassed, behind a random invertible mapping that vflair puts there: once told of it, once not.
Carlini et al., "On Evaluating Adversarial Robustness", arXiv 1902.06705; Tramèr et al., arXiv 2002.08347.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import attrs
import torch
from attrs import define, frozen
from safetensors.torch import save_file
from torch import Tensor

from vflair_core.attacks.adaptive import ON_EMBEDDINGS, ON_HIDDEN, answers, rebuilt_mechanism
from vflair_core.attacks.attack import Guess, Launch
from vflair_core.attacks.evidence import FACTS, read_facts
from vflair_core.attacks.knowledge import DEFENSE
from vflair_core.attacks.scratch import scratch_folder
from vflair_core.communication.transcript import Transcript
from vflair_core.defenses.defense import Defense
from vflair_core.defenses.mechanism import Mechanism
from vflair_core.experiments.grading.answer_key import AnswerKey
from vflair_core.experiments.grading.grades import Grade
from vflair_core.experiments.grading.performance import grade as grade_guess
from vflair_core.experiments.grading.performance import on_bypassed
from vflair_core.experiments.grading.statistics import LEVEL, Floor, chance_of_no_more
from vflair_core.offers import target_of

SEES, GAINS = 0.9, 0.5  # of what it reads where nothing defends; of that by being told
MAPPINGS = 4
ROLES = {"mechanism": "smashed", "parameters": "smashed", "queries": "smashed"}
ROLES |= {"gradient_mechanism": "hidden_grad"}
Run = Callable[[Path, Launch], Guess]  # an attack on the victims of a store


@frozen
class Contract:
    """How an attack did on the same victims: where nothing defends, and behind a mapping, told of it and not told.

    `blind` is None for an attack that cannot do without what it was told.
    """

    open: float
    told: float
    blind: float | None
    floor: float

    @property
    def sees(self) -> bool:
        """Whether it sees through a mapping of which it was told."""
        return self.told > self.floor and self.told >= SEES * self.open

    @property
    def kept(self) -> bool:
        """Whether it does so because it was told."""
        gain = self.told - max(self.blind or 0.0, self.floor)
        return self.sees and gain >= GAINS * (self.told - self.floor)

    @property
    def decides(self) -> bool:
        """Whether another mapping could say nothing else: who is not told may see through one by luck."""
        return self.kept or not self.sees

    def to_dict(self) -> dict[str, float | bool | None]:
        """As plain values."""
        return {**attrs.asdict(self), "kept": self.kept}


@define(slots=False)
class RandomMapping(Defense):
    """Permutes the coordinates of what crosses in some roles and multiplies each by a number, all drawn once.

    It is never given to a party: the core maps what crossed before.
    """

    seed: int = 0
    roles: tuple[str, ...] = ("smashed",)

    def mechanism(self) -> Mechanism | None:
        return Mapped(self.seed) if "smashed" in self.roles else None

    def gradient_mechanism(self) -> Mechanism | None:
        return Mapped(self.seed) if "hidden_grad" in self.roles else None


@frozen
class Mapped(Mechanism):
    """What a `RandomMapping` does: invertible, and nobody finds out which of them it was."""

    seed: int

    def expected(self, hidden: Tensor) -> Tensor:
        width = hidden.shape[-1]
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(width, generator=generator)
        sizes = 2 ** (2 * torch.rand(width, generator=generator) - 1)  # 1/2 … 2
        signs = torch.randint(0, 2, (width,), generator=generator) * 2 - 1
        return hidden[..., order.to(hidden.device)] * (sizes * signs).to(hidden)


def roles_of(used: frozenset[str], store: Path) -> tuple[str, ...]:
    """The roles that must be mapped to try an attack which used these names; none where no mapping would try them.

    How words are replaced, and what happens to embeddings, cannot be tried on messages.
    """
    roles = {ROLES[name] for name in used & ROLES.keys()}
    if "smashed" in roles and "queries" not in used:
        parts = rebuilt_mechanism(read_facts(store)["defenses"], "mechanism", None).parts
        if answers(parts, ON_EMBEDDINGS) and not answers(parts, ON_HIDDEN):
            roles.discard("smashed")
    return tuple(sorted(roles))


def mapped_store(store: Path, folder: Path, mapping: RandomMapping, *, told: bool) -> None:
    """Write into `folder` the evidence of `store` as if only the victims of the bypassed pass had crossed, behind `mapping`.

    Who is not `told` of it gets queries that went another way.
    """
    facts = read_facts(store)
    for name in ("main", "queries-main"):
        source = store / f"{name.replace('main', 'bypassed')}.safetensors"
        if source.exists():
            crossed = Transcript.load(source)
            crossed = _mapped(crossed, mapping) if told or name == "main" else crossed
            crossed.save(folder / f"{name}.safetensors")
    known = {
        f"{name}.safetensors" for name in ("main", "bypassed", "queries-main", "queries-bypassed")
    }
    updates = store / "updates-bypassed.safetensors"
    for file in store.iterdir():
        if file.name not in {*known, FACTS, updates.name, "updates-main.safetensors"}:
            (folder / file.name).symlink_to(file.resolve())
    if updates.exists():
        (folder / "updates-main.safetensors").symlink_to(updates.resolve())
    if (folder / "defenses.safetensors").exists():
        (folder / "defenses.safetensors").unlink()
        save_file({}, folder / "defenses.safetensors")
    spots = {
        name: facts["spots"].get(name.replace("main", "bypassed"), [])
        for name in ("main", "queries-main")
    }
    facts |= {
        **{name: {"main": facts[name]["bypassed"]} for name in ("victims", "releases")},
        "spots": spots,
        "defenses": [{"target": target_of(mapping), "options": attrs.asdict(mapping)}],
    }  # fmt: skip
    (folder / FACTS).write_text(json.dumps(facts))


def _mapped(transcript: Transcript, mapping: RandomMapping) -> Transcript:
    mapped = Mapped(mapping.seed)
    return Transcript(
        [
            attrs.evolve(record, tensor=mapped.expected(record.tensor))
            if record.role in mapping.roles
            else record
            for record in transcript.messages
        ]
    )


def twin_of(launch: Launch) -> Launch | None:
    """The same attack, told nothing of the defense; None if it cannot do without."""
    if DEFENSE.keys() & {*launch.required}:
        return None
    return attrs.evolve(launch, knowledge=tuple(sorted(launch.granted - DEFENSE.keys())))


def behind_a_mapping(
    launch: Launch, roles: tuple[str, ...], store: Path, run: Run, number: int
) -> tuple[Guess, Guess | None]:
    """Guess what the victims of the bypassed pass sent behind a mapping, one of several: told of it, and not told."""
    mapping = RandomMapping((launch.seed + number) & 0x7FFFFFFF, roles)

    def tried(attack: Launch, *, told: bool) -> Guess:
        # Each in a folder of its own: who is told of the mapping finds in it what it was.
        with scratch_folder() as folder:
            mapped_store(store, folder, mapping, told=told)
            return run(folder, attack)

    twin = twin_of(launch)
    return tried(launch, told=True), None if twin is None else tried(twin, told=False)


def judge_adaptive(
    launch: Launch,
    used: frozenset[str],
    grades: Sequence[Grade],
    key: AnswerKey,
    store: Path,
    run: Run,
) -> None:
    """Say in the grades of an attack whether it takes the defense into account, and how it kept the contract.

    It does if it keeps the contract behind the first of a few mappings that its twin does not see through (of two
    classes a mapping may leave each on its side), or names more of these victims than its twin that is not told of this
    defense, by the exact paired test of :func:`~.statistics.chance_of_no_more` (who learned from queries has no such
    twin). A mapping tries no attack on replaced words or on noise in embeddings: who used one of those is taken to have
    used it well.
    """
    for grade in grades:
        grade.adaptive = bool(used)
    adversary = "adversary_state" in launch.required
    roles = () if adversary or not used else roles_of(used, store)
    if not roles or all(grade.verdict != "ok" for grade in grades):
        return
    for number in range(MAPPINGS):
        told, blind = behind_a_mapping(launch, roles, store, run, number)
        each = [_contract(grade, told, blind, key) for grade in grades]
        for grade, contract in zip(grades, each, strict=True):
            grade.contract, grade.adaptive = contract.to_dict(), contract.kept
        if all(contract.decides for contract in each):
            break
    if "queries" not in used:
        _measure_gains(launch, [grade for grade in grades if not grade.adaptive], key, store, run)


def _contract(grade: Grade, told: Guess, blind: Guess | None, key: AnswerKey) -> Contract:
    about = key.of_responses() if grade.target == "response" else key
    return Contract(
        open=grade.positive_control or 0.0,
        told=on_bypassed(told, about),
        blind=None if blind is None else on_bypassed(blind, about),
        floor=grade.floor,
    )


def _measure_gains(
    launch: Launch, grades: Sequence[Grade], key: AnswerKey, store: Path, run: Run
) -> None:
    twin = twin_of(launch)
    if not grades or twin is None:
        return
    guess = run(store, twin)
    for grade in grades:
        about = (key.of_responses() if grade.target == "response" else key).truth
        blind = grade_guess(
            guess.of(key.reported), about.of(key.reported), key.prior, str, name=twin.name, knowledge=twin.knowledge
        )  # fmt: skip
        right = tuple(hit for hit, _ in blind.hits)
        grade.adaptive = chance_of_no_more(grade.hits, Floor(right)) <= 1 - LEVEL
