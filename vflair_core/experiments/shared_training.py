"""Fine-tuning that is the same at every depth of the cut: done at one, and taken over at the others.

Without defenses a decoder or encoder of equal blocks, through which one tensor passes, trains as the whole one does, bit
for bit, so where it was cut makes no difference to what comes of it. Where blocks on both sides read the same tensor or
weight, gradients are summed in another order at each cut, and each trains for itself. What crosses afterwards does depend
on the cut, and is sent anew at each.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vflair_core.communication.transcript import Transcript
from vflair_core.events import events
from vflair_core.experiments.context import RunContext
from vflair_core.experiments.costs import Meter, since, spent_so_far
from vflair_core.experiments.experiment import Experiment, Victims
from vflair_core.experiments.output import aside
from vflair_core.experiments.training_phase import Course, fine_tune
from vflair_core.tasks.task import public_examples
from vflair_core.training.fine_tuning import FineTuning
from vflair_core.training.tuning import EVERYTHING

if TYPE_CHECKING:
    from vflair_core.parties.data_party.party import DataParty
    from vflair_core.parties.model_party.party import ModelParty
    from vflair_core.tasks.tokenization import InputFormat

OF_THE_CUT = {"head", "body", "tail", *EVERYTHING}  # slices that another cut fills differently
log = events(__name__)

RANDOM, RELEASES = "random state", "releases "


def at_any_depth(e: Experiment) -> Experiment | None:
    """What decides the undefended fine-tuning of an experiment, equal at every depth of the cut; None if depth matters.

    It does where what is trained is named by the cut, where messages are rounded, and where the channel, the devices or a
    plugin may tell one cut from another. HT and HBT are trained apart: a tied output layer is untied in one of them only.
    """
    chosen = set() if {*e.train.trainable} == {*EVERYTHING} else {*e.train.trainable}
    placed = e.channel != "local:" or e.devices or e.partition_plugin or e.save
    rounded = e.wire_dtype != "float32"
    if not e.train.steps or placed or rounded or (chosen | {*e.train.lora.full}) & OF_THE_CUT:
        return None
    cut = attrs.evolve(e.partition, head=0, tail=min(e.partition.tail, 1))
    return Experiment(
        task=e.task,
        model=e.model,
        seed=e.seed,
        pretrain=e.pretrain,
        partition=cut,
        train=e.train,
        wire=e.wire,
        threads=e.threads,
        victims=Victims(),
    )


def fine_tune_once(
    name: str,
    party: DataParty,
    model_party: ModelParty,
    reading: InputFormat,
    setting: RunContext,
    meter: Meter,
) -> Course:
    """Fine-tune an arm, or take over what the same training came to at another depth of the cut.

    Where `setting.trained` names a folder, an undefended training leaves its weights there for the others. Blocks of several
    kinds need other tensors beside the hidden states (masks, positions) at each depth; then each trains for itself, because what
    crossed in training is part of what an arm finds.
    """
    same = at_any_depth(setting.experiment) if name == "undefended" else None
    if setting.trained is None or same is None:
        return fine_tune(name, party, setting, meter)
    weights = list(_weights(party, model_party))
    held = Counter(name for name, _ in weights)
    if max(held.values(), default=0) > 1 or not _blocks_are_alike(party, model_party):
        return fine_tune(name, party, setting, meter)
    form = [*_crossing_of_public_text(party, setting), *sorted(_trained(party, model_party))]
    path = setting.trained / f"{same.digest}-{_digest(form)}.safetensors"
    if _is_readable(path, held):
        FineTuning(party, setting.experiment.train)  # victims cross in rounds of training
        facts = _take(path, weights, party)
        reading.tally.examples, reading.tally.truncated = facts["read"]
        meter.taken = {**facts["cost"], "trained_at": facts["cut"]}
        meter.each_step = facts["each_step"]
        return Course(**facts["course"])
    before, buffers = spent_so_far(meter), _buffers(party, model_party)
    course = fine_tune(name, party, setting, meter)
    statistics = zip(buffers, _buffers(party, model_party), strict=True)
    if not _one_tensor_passed(party) or any(not torch.equal(*pair) for pair in statistics):
        return course
    facts = {
        "course": attrs.asdict(course),
        "read": [reading.tally.examples, reading.tally.truncated],
        "cost": since(before, meter),
        "each_step": meter.each_step,
        "cut": party.partition.facts(),
        **_counts(party),
    }
    _keep(path, weights, facts, party)
    return course


def _blocks_are_alike(party: DataParty, model_party: ModelParty) -> bool:
    """Whether the model is one stack of blocks that have the same weights, and are of one kind by its config."""
    if len(party.stages) > 1 or party.model.config.is_encoder_decoder:
        return False
    shapes: dict[str, list[tuple[int, ...]]] = {}
    for owner in (party, model_party):
        for name, weight in owner.model.named_parameters(remove_duplicate=False):
            if "lora_" not in name:
                for block in (each for each in owner.slices.of(name) if each.startswith("blocks.")):
                    shapes.setdefault(block, []).append(tuple(weight.shape))
    kinds = {str(sorted(each)) for each in shapes.values()}
    of_blocks = (
        value
        for value in vars(party.model.config.get_text_config()).values()
        if isinstance(value, (list, tuple)) and len(value) == len(shapes)
    )
    return len(kinds) == 1 and all(len({str(each) for each in value}) == 1 for value in of_blocks)


def _one_tensor_passed(party: DataParty) -> bool:
    """Whether in each exchange one hidden state was sent, and at most one gradient came back for each that was sent."""
    crossed = party.crossed_by_stack
    once = crossed["smashed", 0] == crossed["exchange", 0] and not crossed["weight", 0]
    return once and crossed["smashed_grad", 0] <= crossed["hidden_grad", 0]


def _is_readable(path: Path, names: Iterable[str]) -> bool:
    """Whether another training has left these weights, whole."""
    if not path.exists():
        return False
    try:
        with safe_open(path, "pt") as kept:
            there = set(kept.keys())
    except SafetensorError as error:
        log.warning("training_unreadable", path=str(path), error=str(error))
        return False
    return there >= set(names)


def _digest(form: list[str]) -> str:
    return hashlib.sha256(json.dumps(form).encode()).hexdigest()[:16]


def _crossing_of_public_text(party: DataParty, setting: RunContext) -> list[str]:
    """The roles of all that is sent for two public texts, in their order; no random stream moves."""
    if not setting.task.public:
        return []
    reader = party.preprocessor(setting.experiment.train.max_length)
    reader = attrs.evolve(reader, reading=reader.reading.of_public_text())
    batch = reader.batch(public_examples(setting.task, 2), first_only=True).batch
    training = party.model.training
    party.model.eval()
    with (
        torch.random.fork_rng(),
        torch.no_grad(),
        party.public_text(),
        party.channel.tap(Transcript()) as transcript,
    ):
        party.model(**batch, use_cache=False)
    party.model.train(training)
    return [record.role for record in transcript.messages]


def _trained(*owners: DataParty | ModelParty) -> set[str]:
    """In which parts of the model something is trained: gradients cross for what lies before."""
    names = [
        owner.slices.of(name)
        for owner in owners
        for name, weight in owner.named_parameters()
        if weight.requires_grad
    ]
    return {"head", "body", "tail"} & set().union(*names)


def _weights(*owners: DataParty | ModelParty) -> Iterator[tuple[str, Tensor]]:
    """What training may change, by its name in the whole model; what both parties hold comes twice."""
    for owner in owners:
        for name, weight in owner.named_parameters():
            if weight.requires_grad:
                yield name, weight


def _buffers(*owners: DataParty | ModelParty) -> list[Tensor]:
    return [buffer.clone() for owner in owners for buffer in owner.model.buffers()]


def _counts(party: DataParty) -> dict[str, Any]:
    """How much of private text has crossed, by role and by stack."""
    calls = party.calls
    by_stack = [[role, stack, n] for (role, stack), n in calls.crossed_by_stack.items()]
    return {"crossed": dict(calls.crossed), "crossed_by_stack": by_stack}


def _keep(
    path: Path, weights: Iterable[tuple[str, Tensor]], facts: Mapping[str, Any], party: DataParty
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    tensors = {name: weight.detach().to("cpu", copy=True).contiguous() for name, weight in weights}
    tensors |= {f"{RELEASES}{name}": count for name, count in party.calls.counts.state().items()}
    tensors[RANDOM] = torch.get_rng_state()
    own = path.with_name(f"{path.name}.{os.getpid()}")  # another process may be writing the same
    with aside(own) as part:
        save_file(tensors, part, {"facts": json.dumps(facts)})
    own.replace(path)


def _take(path: Path, weights: Iterable[tuple[str, Tensor]], party: DataParty) -> dict[str, Any]:
    """Give both parties the weights of the training, and the data party its account of what crossed in it."""
    calls, releases = party.calls, dict[str, Tensor]()
    with safe_open(path, "pt") as kept, torch.no_grad():
        facts: dict[str, Any] = json.loads(kept.metadata()["facts"])
        for name, weight in weights:
            weight.copy_(kept.get_tensor(name))
        for name in kept.keys():  # noqa: SIM118 - it is no mapping
            if name.startswith(RELEASES):
                releases[name.removeprefix(RELEASES)] = kept.get_tensor(name)
        torch.set_rng_state(kept.get_tensor(RANDOM))
    calls.counts.load_state(releases)
    calls.crossed = Counter(facts["crossed"])
    calls.crossed_by_stack = Counter({(r, stack): n for r, stack, n in facts["crossed_by_stack"]})
    return facts
