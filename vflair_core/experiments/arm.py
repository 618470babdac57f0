"""One arm of an experiment: cut, defend, fine-tune, let the victims cross, attack, and count."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from attrs import define
from torch import Tensor

from vflair_core.attacks.adversary_host import hosted_adversary
from vflair_core.attacks.evidence import Evidence
from vflair_core.attacks.isolation import attack_device
from vflair_core.attacks.observables import Capture
from vflair_core.communication.message import Message
from vflair_core.communication.transcript import Transcript
from vflair_core.defenses.defense import Defense
from vflair_core.errors import ExperimentError
from vflair_core.events import events
from vflair_core.experiments.attack_phase import attack_arm, references_of
from vflair_core.experiments.build import briefing_of, choose_partition
from vflair_core.experiments.capture import Crossed, capture_victims
from vflair_core.experiments.context import RunContext, noise_seed
from vflair_core.experiments.costs import Meter, convergence, cost_of, first_token, metered
from vflair_core.experiments.experiment import Experiment
from vflair_core.experiments.grading.grades import Grade, Reference
from vflair_core.experiments.model_party_elsewhere import (
    check_stand_in,
    fingerprint_elsewhere,
    is_elsewhere,
)
from vflair_core.experiments.output import closed
from vflair_core.experiments.promises import promises_of, samples_of
from vflair_core.experiments.seams import seams
from vflair_core.experiments.shared_training import fine_tune_once
from vflair_core.experiments.training_phase import Course, steps_per_epoch
from vflair_core.experiments.victims import auxiliary_of
from vflair_core.parties.split import split
from vflair_core.partition.slices import Slices
from vflair_core.randomness import stream_seed
from vflair_core.tasks.tokenization import InputFormat
from vflair_core.training.tuning import tune

if TYPE_CHECKING:
    from vflair_core.parties.data_party.party import DataParty
    from vflair_core.parties.model_party.party import ModelParty


log = events(__name__)

_Cut: TypeAlias = "tuple[DataParty, ModelParty, InputFormat, dict[str, int]]"


@define
class Arm:
    """What one arm found, and what the other needs of it."""

    numbers: dict[str, Any]
    cost: dict[str, Any]
    transcript: Transcript
    grades: list[Grade]
    samples: list[dict[str, Any]]
    references: list[Reference]  # what each attack reached, for the other arm to compare with
    slices: Slices  # of the model as it was cut


def run_arm(
    name: str,
    model: Any,
    defenses: list[Defense],
    setting: RunContext,
    references: list[Reference],
    *,
    active: bool = False,
) -> Arm:
    """Run one arm on `model`, which it consumes; `references` come from the undefended arm.

    In an `active` arm the adversary of the experiment is in the model party's place.
    """
    setting.tell("vflair_arm_started", arm=name, seed=setting.experiment.seed)
    cut = _cut(model, defenses, setting)
    try:
        with metered(*cut[:2]) as meter:
            arm = _run_arm(name, cut, defenses, setting, references, meter, active=active)
        if is_elsewhere(setting.experiment):
            cut[0].close()
        return arm
    finally:
        cut[0].channel.close()


def _run_arm(
    name: str,
    cut: _Cut,
    defenses: list[Defense],
    setting: RunContext,
    references: list[Reference],
    meter: Meter,
    *,
    active: bool,
) -> Arm:
    party, model_party, _, trained = cut
    if name == "undefended":  # others hold as many
        log.info("parameters", **meter.held, total=sum(meter.held.values()))
    adversary = _adversary(party, model_party, setting) if active else nullcontext(lambda: None)
    with adversary as state_of:
        course, crossed = _let_cross(name, cut, setting, meter, defended=bool(defenses))
        state = state_of()
    with meter("attacks"):
        grades, truth = attack_arm(
            name, party, model_party, setting, crossed, references, adversary=state
        )
    for grade in grades:
        setting.tell("vflair_attack_finished", arm=name, name=grade.attack, grade=grade.to_dict())
    # Before defenses measure themselves, which may cross.
    cost = cost_of(meter, grades, setting.experiment, trained)
    cost["convergence"] = convergence(
        course.losses,
        course.evaluations,
        meter.each_step,
        steps_per_epoch(setting),
        evaluated=bool(setting.experiment.train.evaluate_every),
    )
    numbers = _numbers(course, grades, cut, defenses, setting)
    samples = samples_of(grades, truth)
    cost["first_token"] = first_token(party, setting)  # last, for it crosses and draws
    return Arm(
        numbers, cost, crossed[0].transcript, grades, samples, references_of(grades), party.slices
    )


def _let_cross(
    name: str, cut: _Cut, setting: RunContext, meter: Meter, *, defended: bool
) -> tuple[Course, Crossed]:
    """Prepare the defenses, fine-tune, save if that is asked for, and let the victims cross."""
    party, model_party, reading, _ = cut
    with meter("preparing"):
        party.prepare(
            setting.task.public,
            cache=setting.cache,
            report=lambda what, done, total: setting.report(f"{name}: {what}", done, total),
        )
    with _watched(name, party, setting):
        with meter("fine-tuning"):
            course = fine_tune_once(name, party, model_party, reading, setting, meter)
        if setting.experiment.save:
            _save(name, party, model_party, setting)
        with meter("victims"), setting.phase(f"{name}: victims"):
            return course, capture_victims(party, setting, defended=defended)


def _numbers(
    course: Course, grades: list[Grade], cut: _Cut, defenses: list[Defense], setting: RunContext
) -> dict[str, Any]:
    """All that the arm found, but for what differs from one machine to the next."""
    e, (party, _, reading, trained) = setting.experiment, cut
    metric, performance = next(iter(course.evaluations[-1]["metrics"].items()))
    return {
        "main_performance": performance,
        "metric": metric,
        "chance": course.chance,
        "losses": course.losses,
        "evaluations": course.evaluations,
        "attacks": [grade.numbers() for grade in grades],
        "seams": seams(
            party.crossed_by_stack,
            len(party.stages),
            [(d.name, each.covers) for d, each in zip(e.defenses, defenses, strict=False)],
            grades,
            updates=e.victims.count // e.victims.update_batch if e.victims.share_updates else 0,
            saved=int(e.save),
        ),
        **promises_of(defenses, party, setting, reading),
        "trained_weights": trained,
        "partition": party.partition.facts(),
        "untied": list(party.untied),
        "disclosed": sorted(party.disclosed),
        "isolation": e.isolation,
        "companions": e.victims.companions,
        "wire_dtype": party.channel.wire_dtype,
        "victims_with_dropout": e.victims.dropout,
        "assumes_shared_updates": e.victims.share_updates,
    }


def _adversary(
    party: DataParty, model_party: ModelParty, setting: RunContext
) -> AbstractContextManager[Callable[[], dict[str, Tensor]]]:
    """The adversary of the experiment in the model party's place; it yields what tells its state."""
    e = setting.experiment
    if setting.adversary is None:
        return nullcontext(dict)
    evidence = Evidence(
        party=party,
        model_party=model_party,
        pretrained=setting.pretrained,
        main=Capture(Transcript(), [], []),
        bypassed=None,
        releases=1,
        task_kind=setting.task.kind,
        victims={"main": 0},
        seed=setting.private_seed,
        auxiliary=auxiliary_of(setting.task, e.victims, setting.private_seed),
    )
    return hosted_adversary(
        evidence,
        briefing_of(setting.adversary),
        isolation=e.isolation,
        threads=e.threads or torch.get_num_threads(),
        device=attack_device(e.attack_device),
    )


def _cut(model: Any, defenses: list[Defense], setting: RunContext) -> _Cut:
    """Split the model and choose what is trained; return both parties, how the task is read, and
    how many numbers each trains.
    """
    e = setting.experiment
    partition = choose_partition(model, e, setting.plugins)
    party, model_party = split(
        model,
        partition,
        defenses=defenses,
        tokenizer=setting.tokenizer,
        channel=e.channel,
        wire=e.wire,
        wire_dtype=e.wire_dtype,
        fingerprint=fingerprint_elsewhere(model, partition, setting),
        devices=e.devices,
        seed=noise_seed(e.seed, setting.task),
        plugins=setting.plugins,
    )
    reading = setting.take_up(party)
    trained = {"data_party": choose(party, e), "model_party": choose(model_party, e)}
    if is_elsewhere(e):
        weights = model_party.named_parameters()
        chosen = [name for name, weight in weights if weight.requires_grad]
        try:
            check_stand_in(party, chosen, setting)
        except BaseException:
            party.channel.close()
            raise
    if not any(trained.values()) and e.train.steps:
        raise ExperimentError(
            "train.trainable and train.lora leave nothing to train at either party."
        )
    return party, model_party, reading, trained


def choose(owner: Any, e: Experiment, slices: Slices | None = None) -> int:
    """Choose what the experiment trains of a party, or of the whole model; return how many numbers that is."""
    seed = stream_seed(e.seed, "adapters")
    names = tune(owner, e.train.trainable, adapters=e.train.lora, seed=seed, slices=slices)
    weights = dict(owner.named_parameters())
    return sum(weights[name].numel() for name in names)


def _save(arm: str, party: DataParty, model_party: ModelParty, setting: RunContext) -> None:
    if setting.out is None:
        raise ExperimentError("save = true needs an output folder: pass out= (or --out).")
    with closed(setting.out / arm) as folder:
        paths = (party.save(folder), model_party.save(folder))
    for path in paths:
        setting.tell("vflair_checkpoint_saved", arm=arm, path=str(path), step=party.step)


@contextmanager
def _watched(name: str, party: DataParty, setting: RunContext) -> Iterator[None]:
    """Tell the observers of messages, if there are any: a tap costs a copy of everything."""

    def tell(message: Message, direction: str, seconds: float) -> None:
        for crossing in message.tensors:
            setting.tell(
                f"vflair_message_{direction}",
                arm=name,
                kind=message.kind,
                role=crossing.role,
                direction=direction,
                step=message.step,
                nbytes=crossing.nbytes,
                seconds=seconds,
            )

    hooks = ("vflair_message_sent", "vflair_message_received")
    heard = any(getattr(setting.plugins.hook, hook).get_hookimpls() for hook in hooks)
    taps: AbstractContextManager[Any] = party.channel.tap(tell) if heard else nullcontext()
    with taps:
        yield
