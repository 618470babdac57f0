"""One arm of an experiment: cut, defend, fine-tune, let the victims cross, attack, and count."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

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
from vflair_core.experiments.account import cost_of, promises_of, samples_of
from vflair_core.experiments.attack_phase import attack_arm, references_of
from vflair_core.experiments.build import briefing_of, choose_partition
from vflair_core.experiments.capture import capture_victims
from vflair_core.experiments.context import Clock, RunContext, noise_seed
from vflair_core.experiments.experiment import Experiment
from vflair_core.experiments.grading.grades import Grade, Reference
from vflair_core.experiments.output import closed
from vflair_core.experiments.victims import auxiliary_of
from vflair_core.parties.split import split
from vflair_core.partition.slices import Slices
from vflair_core.randomness import stream_seed
from vflair_core.tasks.tokenization import InputFormat
from vflair_core.training.evaluation import Evaluation, evaluate_party
from vflair_core.training.fine_tuning import FineTuning
from vflair_core.training.tuning import tune

if TYPE_CHECKING:
    from vflair_core.parties.data_party.party import DataParty
    from vflair_core.parties.model_party.party import ModelParty


log = events(__name__)


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
    e, clock = setting.experiment, Clock()
    party, model_party, reading, trained = _cut(model, defenses, setting)
    if name == "undefended":  # others hold as many
        held = [sum(p.numel() for p in owner.parameters()) for owner in (party, model_party)]
        log.info("parameters", data_party=held[0], model_party=held[1], total=sum(held))
    with (
        _adversary(party, model_party, setting) if active else nullcontext(dict) as adversary_state
    ):
        with clock("preparing"):
            party.prepare(
                setting.task.public,
                cache=setting.cache,
                report=lambda what, done, total: setting.report(f"{name}: {what}", done, total),
            )
        with _watched(name, party, setting):
            with clock("fine-tuning"):
                losses, evaluations, chance = _fine_tune(name, party, setting)
            if e.save:
                _save(name, party, model_party, setting)
            with clock("victims"), setting.phase(f"{name}: victims"):
                crossed = capture_victims(party, setting, defended=bool(defenses))
        state = adversary_state() if active else None
    with clock("attacks"):
        grades, truth = attack_arm(
            name, party, model_party, setting, crossed, references, adversary=state
        )
    for grade in grades:
        setting.tell("vflair_attack_finished", arm=name, name=grade.attack, grade=grade.to_dict())
    # Before defenses measure themselves, which may cross.
    cost = cost_of(party, clock, grades, e.attack_device, e.isolation)
    metric, performance = next(iter(evaluations[-1]["metrics"].items()))
    numbers = {
        "main_performance": performance,
        "metric": metric,
        "chance": chance,
        "losses": losses,
        "evaluations": evaluations,
        "attacks": [grade.numbers() for grade in grades],
        **promises_of(defenses, party, setting, reading),
        "trained_weights": trained,
        "partition": party.partition.facts(),
        "untied": list(party.untied),
        "disclosed": sorted(party.disclosed),
        "isolation": e.isolation,
        "companions": e.victims.companions,
        "victims_with_dropout": e.victims.dropout,
        "assumes_shared_updates": e.victims.share_updates,
    }
    samples = samples_of(grades, truth)
    return Arm(
        numbers, cost, crossed[0].transcript, grades, samples, references_of(grades), party.slices
    )


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


def _cut(
    model: Any, defenses: list[Defense], setting: RunContext
) -> tuple[DataParty, ModelParty, InputFormat, dict[str, int]]:
    """Split the model and choose what is trained; return both parties, how the task is read, and
    how many numbers each trains.
    """
    e = setting.experiment
    party, model_party = split(
        model,
        choose_partition(model, e, setting.plugins),
        defenses=defenses,
        tokenizer=setting.tokenizer,
        channel=e.channel,
        wire=e.wire,
        devices=e.devices,
        seed=noise_seed(e.seed, setting.task),
        plugins=setting.plugins,
    )
    reading = setting.take_up(party)
    trained = {"data_party": choose(party, e), "model_party": choose(model_party, e)}
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


def _fine_tune(
    name: str, party: DataParty, setting: RunContext
) -> tuple[list[float], list[dict[str, Any]], float]:
    """Return the loss of each step, all evaluations, and the MP of chance."""
    e, total = setting.experiment, setting.experiment.train.steps
    setting.report(f"{name}: fine-tuning", 0, total)
    rounds = FineTuning(party, e.train)
    before = _evaluate(name, party, setting)
    evaluations, losses = [_as_row(party, before)], []
    torch.manual_seed(stream_seed(e.seed, "dropout"))
    per_epoch = -(-len(setting.task.train) // e.train.batch_size)
    reader = party.preprocessor(e.train.max_length)
    for number, examples in enumerate(setting.batches(), start=1):
        setting.tell("vflair_step_started", arm=name, step=party.step)
        losses.append(rounds.step(reader.batch(examples, pack_rows=e.train.packing).batch))
        setting.tell("vflair_step_finished", arm=name, step=party.step, loss=losses[-1])
        log.debug("step_finished", arm=name, step=party.step, loss=losses[-1])
        if number % per_epoch == 0:
            setting.tell(
                "vflair_epoch_finished", arm=name, epoch=number // per_epoch, step=party.step
            )
        every = e.train.evaluate_every
        if every and number % every == 0 and number < total:
            evaluations.append(_as_row(party, _evaluate(name, party, setting)))
        setting.report(f"{name}: fine-tuning, loss {losses[-1]:.3f}", number, total)
    evaluations.append(_as_row(party, _evaluate(name, party, setting)))
    return losses, evaluations, before.chance


def _as_row(party: DataParty, evaluation: Evaluation) -> dict[str, Any]:
    return {"step": party.step, "metrics": evaluation.metrics}


def _evaluate(name: str, party: DataParty, setting: RunContext) -> Evaluation:
    options = setting.experiment.train
    with torch.random.fork_rng():  # however often it is watched, training takes the same steps
        evaluation = evaluate_party(
            party,
            setting.task,
            batch_size=max(options.batch_size, 16),
            max_length=options.max_length,
        )
    setting.tell("vflair_evaluated", arm=name, step=party.step, metrics=evaluation.metrics)
    return evaluation


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
