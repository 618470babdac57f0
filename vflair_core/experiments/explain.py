"""What an experiment sends across the cut, found by sending one training batch of public text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import attrs
from torch import Tensor

from vflair_core.communication.transcript import Transcript
from vflair_core.experiments.base_model import prepare_model
from vflair_core.experiments.build import choose_partition
from vflair_core.experiments.experiment import Experiment
from vflair_core.offers import build, find
from vflair_core.parties.data_party.party import DataParty
from vflair_core.parties.split import split
from vflair_core.plugins import PluginManager
from vflair_core.randomness import stream_seed
from vflair_core.tasks.task import Task, public_examples

TEXTS_ARE_LABELS = ("causal-lm", "seq2seq", "image-text")


def explain(experiment: Experiment, plugins: PluginManager) -> dict[str, Any]:
    """Return every crossing of one training round, owner and shape of every weight, totals, and what to know about it.

    Nothing private is sent: the batch is public text (the task's examples if it has none).
    """
    task: Task = build(find(plugins, "tasks", experiment.task.name), experiment.task.options)
    untrained = attrs.evolve(experiment.pretrain, steps=0)
    model, tokenizer, processor = prepare_model(
        attrs.evolve(experiment, pretrain=untrained), task, lambda *_: None
    )
    defenses = [build(find(plugins, "defenses", d.name), d.options) for d in experiment.defenses]
    seed = stream_seed(experiment.seed, "noise")
    party, model_party = split(
        model,
        choose_partition(model, experiment, plugins),
        defenses=defenses,
        tokenizer=tokenizer,
        seed=seed,
        plugins=plugins,
    )
    reading = party.take_up(task, processor=processor)
    party.prepare(task.public)
    count = experiment.train.batch_size
    examples = public_examples(task, count)
    if examples:
        party.take_up_format(attrs.evolve(reading, render=None))
    else:
        examples = [task.row("train", n) for n in range(min(count, len(task.train)))]
    batch = party.encode(examples, max_length=experiment.train.max_length)
    party.model.train()
    with party.channel.tap(Transcript()) as transcript:
        party.model(**batch, use_cache=False).loss.backward()
    crossings = [
        {
            "message": record.kind,
            "direction": record.direction,
            "tensor": record.name,
            "role": record.role,
            "dtype": str(record.tensor.dtype).removeprefix("torch."),
            "shape": list(record.tensor.shape),
            "bytes": record.tensor.numel() * record.tensor.element_size(),
        }
        for record in transcript.messages
    ]
    held = {
        "data party": dict(party.named_parameters()),
        "model party": dict(model_party.named_parameters()),
    }
    totals = {party: _total(weights.values()) for party, weights in held.items()}
    return {
        "crossings": crossings,
        "owners": {name: party for party, weights in held.items() for name in weights},
        "shapes": {n: list(w.shape) for weights in held.values() for n, w in weights.items()},
        "totals": {
            **totals,
            "both": {
                key: sum(total[key] for total in totals.values()) for key in totals["data party"]
            },
        },
        "notes": _notes(experiment, task, party),
    }


def _total(weights: Iterable[Tensor]) -> dict[str, int]:
    """How many weights these are, of how many parameters and bytes."""
    each = list(weights)
    parameters, size = sum(w.numel() for w in each), sum(w.numel() * w.element_size() for w in each)
    return {"weights": len(each), "parameters": parameters, "bytes": size}


def _notes(experiment: Experiment, task: Task, party: DataParty) -> list[str]:
    notes = []
    if party.partition.kind == "HT":
        text = ", which are the text itself" if task.kind in TEXTS_ARE_LABELS else ""
        notes.append(
            "HT training hands the labels over: the gradient of the logits has one negative entry per row, "
            f"at the label{text}."
        )
    notes += [
        f"{name} was tied to a weight of the data party; each side now has its own."
        for name in party.untied
    ]
    if party.partition.disclosing:
        names = ", ".join(party.partition.disclosing)
        notes.append(
            f"Crosses although it depends on the text, because the experiment says so: {names}."
        )
    if not experiment.defenses:
        notes.append("No defense: hidden states cross as they are.")
    for spec, defense in zip(experiment.defenses, party.defenses.each, strict=True):
        covered = ", ".join(sorted(defense.covers)) or "nothing it names"
        notes.append(f"{spec.name} covers {covered}; the rest crosses as it is.")
    return notes
