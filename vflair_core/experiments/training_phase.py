"""The fine-tuning of an arm: its steps, the evaluations between them, and what observers are told of both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen

from vflair_core.events import events
from vflair_core.experiments.context import RunContext
from vflair_core.experiments.costs import STEPS, Meter
from vflair_core.randomness import stream_seed
from vflair_core.training.evaluation import Evaluation, evaluate_party
from vflair_core.training.fine_tuning import FineTuning

if TYPE_CHECKING:
    from vflair_core.parties.data_party.party import DataParty

log = events(__name__)


@frozen
class Course:
    """How a fine-tuning went: the loss of each step, all evaluations, and the MP of chance."""

    losses: list[float]
    evaluations: list[dict[str, Any]]
    chance: float


def fine_tune(name: str, party: DataParty, setting: RunContext, meter: Meter) -> Course:
    """Fine-tune an arm, and evaluate it before, on the way and after."""
    e, total = setting.experiment, setting.experiment.train.steps
    setting.report(f"{name}: fine-tuning", 0, total)
    rounds = FineTuning(party, e.train)
    before = _evaluate(name, party, setting)
    evaluations, losses = [_as_row(party, before)], []
    torch.manual_seed(stream_seed(e.seed, "dropout"))
    per_epoch = steps_per_epoch(setting)
    reader = party.preprocessor(e.train.max_length)
    for number, examples in enumerate(setting.batches(), start=1):
        setting.tell("vflair_step_started", arm=name, step=party.step)
        with meter(STEPS):
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
    return Course(losses, evaluations, before.chance)


def steps_per_epoch(setting: RunContext) -> int:
    """How many steps it takes to see every training example once."""
    return -(-len(setting.task.train) // setting.experiment.train.batch_size)


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
