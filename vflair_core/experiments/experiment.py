"""An experiment: everything that decides the numbers of a run, as one frozen record.

Each field's comment is its line in the documentation: what it is, in which unit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal

import attrs
from attrs import field, frozen, validators

from vflair_core.errors import ExperimentError
from vflair_core.partition.partition import Partition
from vflair_core.training.fine_tuning import Train


@frozen
class Model:
    """The model and its tokenizer: a name to load, or a config to build a random one from.

    Attributes:
        name: Name on the hub, folder or "package:NAME/FOLDER" of a pretrained model; with it, no config.
        gguf_file: GGUF file there that holds the model; it is converted once.
        config: Fields of a transformers config, `model_type` first; weights start random.
        vocab_size: Entries of the tokenizer that is trained on the public text when a config is given.
    """

    name: str = ""
    gguf_file: str = ""
    config: Mapping[str, Any] = field(factory=dict)
    vocab_size: int = field(default=2048, validator=validators.ge(259))

    def __attrs_post_init__(self) -> None:
        if bool(self.name) == bool(self.config):
            raise ExperimentError(
                "[model] needs either name = 'a model to load' or config = { model_type = 'llama', … }, "
                "and not both."
            )
        if self.gguf_file and not self.name:
            raise ExperimentError("model.gguf_file needs a model.name: where the file lies.")
        if self.config and "model_type" not in self.config:
            raise ExperimentError("model.config needs a model_type, e.g. model_type = 'llama'.")


@frozen
class Pretrain:
    """The public phase: language modelling on the task's public text, before any cut.

    Attributes:
        steps: Optimizer steps; 0 skips the phase.
        batch_size: Sequences per step.
        learning_rate: Peak learning rate of AdamW, cosine to 0.
        length: Tokens per sequence.
    """

    steps: int = field(default=0, validator=validators.ge(0))
    batch_size: int = field(default=16, validator=validators.ge(1))
    learning_rate: float = field(default=1e-3, validator=validators.gt(0))
    length: int = field(default=64, validator=validators.ge(2))


@frozen
class Named:
    """Something a plugin offers, with options: a task, a defense.

    Attributes:
        name: Its name, as `vflair list` shows it.
        options: Its options, as `vflair show NAME` lists them.
    """

    name: str
    options: Mapping[str, Any] = field(factory=dict)


@frozen
class AttackSpec(Named):
    """An attack and what its attacker may know.

    Attributes:
        name: Its name, as `vflair list attacks` shows it.
        options: Its options, as `vflair show NAME` lists them.
        knowledge: A preset K0 … K4, a name of the vocabulary, or a list of them.
    """

    knowledge: str | tuple[str, ...] = "K4"


@frozen
class Victims:
    """Whose messages are attacked.

    Attributes:
        count: Examples attacked.
        split: Where they are taken from, in order: train or test.
        phase: train sends each through a training round, inference through a forward only.
        releases: How often each example crosses.
        companions: Other examples in the batch that each victim crosses in, of the same split and no victims, for classes at least one of another class. The attacker is told which row is the victim's. Left out, victims cross as training does: beside train.batch_size - 1 others in phase train, where there are so many and the model's batches allow it, else alone.
        dropout: Whether victims cross with dropout, which defends them by chance; an attack that averages `releases` sees through it.
        max_length: Tokens kept of each victim; 0 takes train.max_length.
        bypass: Victims that cross once more with the defense bypassed, for the positive control.
        queries: Public texts sent through the defended pipeline for attacks that ask for `queries`.
        known: First victims whose labels the attacker is told, for attacks that ask for `known_labels`; labels are graded on the others.
        development: Last victims, on which the strongest attack is chosen; grades are of the others.
        candidates: Texts offered to attacks on membership, one half victims, the other never used.
        share_updates: The attacker also sees the gradients of the data party's weights, as an aggregator of several data parties would; an assumption that the result states.
        update_batch: Victims that share one of these updates: the gradient of a batch, as a party that trains on batches sends it.
    """

    count: int = field(default=16, validator=validators.ge(2))
    split: Literal["train", "test"] = "train"
    phase: Literal["train", "inference"] = "train"
    releases: int = field(default=1, validator=validators.ge(1))
    companions: int | None = field(default=None, validator=validators.optional(validators.ge(0)))
    dropout: bool = False
    max_length: int = field(default=0, validator=validators.ge(0))
    bypass: int = field(default=4, validator=validators.ge(1))
    queries: int = field(default=64, validator=validators.ge(0))
    known: int = field(default=0, validator=validators.ge(0))
    development: int = field(default=0, validator=validators.ge(0))
    candidates: int = field(default=0, validator=validators.ge(0))
    share_updates: bool = False
    update_batch: int = field(default=1, validator=validators.ge(1))

    def __attrs_post_init__(self) -> None:
        if self.share_updates and self.phase != "train":
            raise ExperimentError(
                'victims.share_updates needs victims.phase = "train": at inference there is no gradient.'
            )
        if self.known + self.development >= self.count - 1:
            raise ExperimentError(
                f"victims.known = {self.known} and victims.development = {self.development} of victims.count = "
                f"{self.count}: at least two victims must be left to grade."
            )
        self._check_batches()
        if self.candidates % 2 or self.candidates > 2 * self.count:
            raise ExperimentError(
                f"victims.candidates is {self.candidates}: give an even number up to {2 * self.count}, twice "
                "victims.count, since half of them are victims."
            )

    def _check_batches(self) -> None:
        size = self.update_batch
        if size == 1:
            return
        if not self.share_updates:
            raise ExperimentError(
                f"victims.update_batch = {size} says how many victims share an update, and no updates are shared. Set "
                "victims.share_updates = true, or leave it out."
            )
        odd = [n for n in ("count", "known", "development", "bypass") if getattr(self, n) % size]
        if odd:
            given = ", ".join(f"victims.{name} = {getattr(self, name)}" for name in odd)
            raise ExperimentError(
                f"{given}, but victims.update_batch = {size} victims share an update, and an update is attacked and "
                f"graded as a whole. Give multiples of {size}."
            )
        if self.count - self.known - self.development < 2 * size:
            raise ExperimentError(
                f"victims.count = {self.count} leaves fewer than two updates of victims.update_batch = {size} to "
                "grade: the floor holds each update against the others. Give more victims."
            )


@frozen
class Experiment:
    """Everything that decides the numbers.

    Attributes:
        seed: Seed of every random stream.
        seeds: Run once with each of these seeds instead, at least five; the result adds means and paired intervals over them.
        model: The model.
        pretrain: The public phase.
        task: The private task.
        partition: The cut.
        train: The private fine-tuning.
        defenses: Applied in this order; with any, an undefended reference runs first.
        attacks: Attacks on both.
        adversary: An attack whose model party cheats in fine-tuning; both arms run once more under it, and are reported apart.
        victims: Whose messages are attacked.
        check_unsplit: Train the unsplit model beside the undefended split and compare all losses.
        partition_plugin: Name of the plugin that chooses the cut by `vflair_partition`; empty takes `partition` as it is.
        channel: Where messages go: "local:", "grpc://HOST:PORT" for a model party in another process, or a URL that a plugin opens.
        wire: Pass every message through the codec.
        wire_dtype: What hidden states and their gradients are rounded to on their way: float32 rounds nothing; bfloat16 and int8 need `wire` or a model party elsewhere.
        devices: Where the model party computes; with more than one, a plugin places it.
        attack_device: Where the models of attacks compute: cpu, cuda, cuda:1, …; auto is CUDA where it is there.
        save: Write both parties' weights after fine-tuning, each its own, into the output folder.
        isolation: process grades attacks in a worker of their own; inline is for notebooks, and recorded.
        threads: CPU threads; 0 leaves torch's choice.
    """

    task: Named
    model: Model
    seed: int = 0
    seeds: tuple[int, ...] = field(default=(), converter=tuple)
    pretrain: Pretrain = Pretrain()
    partition: Partition = Partition()
    train: Train = Train()
    defenses: tuple[Named, ...] = ()
    attacks: tuple[AttackSpec, ...] = ()
    adversary: AttackSpec | None = None
    victims: Victims = Victims()
    check_unsplit: bool = False
    partition_plugin: str = ""
    channel: str = "local:"
    wire: bool = False
    wire_dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    devices: tuple[str, ...] = ()
    attack_device: str = "auto"
    save: bool = False
    isolation: Literal["process", "inline"] = "process"
    threads: int = field(default=0, validator=validators.ge(0))

    def __attrs_post_init__(self) -> None:
        if self.seeds and len(set(self.seeds)) < max(5, len(self.seeds)):
            raise ExperimentError(
                f"seeds = {list(self.seeds)}: give five or more, all different, or none. An interval over fewer "
                "says little."
            )

    def to_dict(self) -> dict[str, Any]:
        """As plain values, in the order of the fields."""
        return attrs.asdict(self)

    @property
    def digest(self) -> str:
        """Hash of all fields: equal for experiments that must give equal numbers."""
        text = json.dumps(self.to_dict(), sort_keys=True, default=list)
        return hashlib.sha256(text.encode()).hexdigest()[:16]
