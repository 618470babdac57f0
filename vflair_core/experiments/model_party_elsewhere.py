"""What an experiment can do when its model party is in another process: what needs the other half's weights is refused.

The model party of such an arm is a stand-in: the same weights, cut out of the same model, that answer nothing. As long as
nothing trains the real one, the stand-in is what an attack on its half would see.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from vflair_core.attacks.attack import Launch
from vflair_core.attacks.evidence import FILES, needed
from vflair_core.errors import ExperimentError
from vflair_core.experiments.experiment import Experiment
from vflair_core.parties.checkpoint_source import find_source
from vflair_core.partition.fingerprint import fingerprint
from vflair_core.tasks.kinds import KINDS

if TYPE_CHECKING:
    from vflair_core.experiments.context import RunContext
    from vflair_core.parties.data_party.party import DataParty
    from vflair_core.partition.partition import Partition

TRAINED = frozenset({"body.safetensors", "current.safetensors"})  # evidence of weights it may train


def is_elsewhere(e: Experiment) -> bool:
    """Whether the model party is in another process."""
    return e.channel.startswith("grpc:")


def check_elsewhere(e: Experiment) -> None:
    """See that an experiment asks for nothing that a model party elsewhere cannot do.

    Raises:
        ExperimentError: It does.
    """
    if not is_elsewhere(e):
        return
    if e.adversary is not None:
        raise ExperimentError(
            f"[adversary] takes the model party's place, and that of channel = {e.channel!r} is in another process. Leave it "
            "out, or use channel = 'local:'."
        )
    if e.devices:
        raise ExperimentError(
            f"devices says where the model party computes, and that of channel = {e.channel!r} was placed by its operator. "
            "Leave it out."
        )
    if e.pretrain.steps:
        raise ExperimentError(
            f"pretrain.steps trains the whole model before it is cut, and the model party at channel = {e.channel!r} has its "
            "weights already. Set pretrain.steps = 0, or save the pretrained model and serve that."
        )


def check_seeds(e: Experiment) -> None:
    """See that a model party elsewhere is not trained with one seed after the other.

    Raises:
        ExperimentError: It would be.
    """
    theirs = sorted({"model_party", "body"} & set(e.train.trainable))
    if is_elsewhere(e) and e.seeds and e.train.steps and theirs:
        raise ExperimentError(
            f"train.trainable = {list(e.train.trainable)} trains the model party at channel = {e.channel!r}, and each seed "
            "needs one that is as it was loaded. Train the data party only (train.trainable = ['data_party']), or use "
            "channel = 'local:'."
        )


def fingerprint_elsewhere(model: Any, partition: Partition, setting: RunContext) -> str | None:
    """The fingerprint of a model party that was loaded from the experiment's checkpoint; None where there is none."""
    import transformers

    spec, kind = setting.experiment.model, KINDS[setting.task.kind]
    if not is_elsewhere(setting.experiment) or not spec.name:
        return None
    options: dict[str, Any] = (
        {"num_labels": max(len(setting.task.labels), 1)} if kind.labelled else {}
    )
    if spec.gguf_file:
        options["gguf_file"] = spec.gguf_file
    source = find_source(spec.name, getattr(transformers, kind.auto), options)
    named = type(model).__name__
    return fingerprint(named, source.config, partition, source.weights, dtype=model.config.dtype)


def check_stand_in(party: DataParty, chosen: Collection[str], setting: RunContext) -> None:
    """See that the model party elsewhere trains what the experiment says, and that the stand-in stays true to it.

    Args:
        party: Its session is open.
        chosen: Names of the weights that the experiment trains of the stand-in.
        setting: Of the experiment.

    Raises:
        ExperimentError: It trains others, has been trained since it was loaded, or would be and must not.
    """
    e = setting.experiment
    there = set(party.connection.facts()["trainable"])
    if e.train.steps and there != set(chosen):
        odd = sorted(there ^ set(chosen))
        raise ExperimentError(
            f"The model party at channel = {e.channel!r} trains {len(there)} weights, and train.trainable and train.lora say "
            f"{len(chosen)} of its half: {', '.join(odd[:4])} and others differ. Its operator chooses them "
            "(vflair_core.tune); e.g. train.trainable = ['data_party'] fits one that trains none."
        )
    if party.open().get("moved"):
        raise ExperimentError(
            f"The model party at channel = {e.channel!r} has been trained since it was loaded, so it is not the model of this "
            "experiment any more. Have it started anew."
        )
    if e.train.steps and chosen:
        _check_trained(e, setting.launches, keep=setting.keep)


def _check_trained(e: Experiment, launches: Collection[Launch], *, keep: bool) -> None:
    """See that nothing needs to know how training changes the model party, or a second one that is as it was."""
    where = f"The model party at channel = {e.channel!r} is trained in this experiment"
    remedy = (
        "Train the data party only (train.trainable = ['data_party']), or use channel = 'local:'."
    )
    if e.defenses:
        raise ExperimentError(
            f"{where}, and defenses need more than one arm, each from the weights it was loaded with. {remedy}"
        )
    files = FILES if keep else needed(list(launches))
    if wanted := sorted(TRAINED & set(files)):
        raise ExperimentError(
            f"{where}, and what is attacked or kept needs its weights afterwards ({', '.join(wanted)}), which its operator "
            f"has. {remedy}"
        )
    if e.save:
        raise ExperimentError(
            f"{where}, and save = true would write its half, which its operator has. {remedy}"
        )
