"""What a run says (Flower's run config), and what a node says of itself (its node config)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import attrs
from attrs import field, frozen, validators

from vflair_core import ExperimentError, Lora, Partition, Train, alternatives

Values = Mapping[str, Any]
Record = TypeVar("Record")


def _positive(default: int) -> Any:
    return field(default=default, validator=validators.ge(1))


@frozen
class RunOptions:
    """What all parties of a run do alike, but for `listen` and what follows, which is the model party's alone.

    Attributes:
        model: Folder, hub name or ``package:NAME/FOLDER``, called alike at all parties.
        gguf_file: GGUF file of the model.
        partition: Blocks that a data party keeps at either end: ``HEAD,TAIL``.
        rounds: Messages of training to each node.
        steps: Optimizer steps of each round.
        batch_size: Records of a step.
        learning_rate: Of both parties' optimizers.
        max_length: Tokens kept of a record.
        lora_r: Rank of the adapters.
        lora_alpha: Their scale times the rank.
        lora_dropout: Probability of dropping an input of an adapter.
        seed: Of the adapters' first weights and of the order of records.
        sharing: How the nodes share the model party's weights: ``mean`` or ``turns``.
        average: Let nodes send their adapters to Flower, to be averaged after each round.
        min_nodes: Nodes that a run waits for, and begins with.
        folder: Where the model party writes its half and what happened; empty writes neither.
        listen: ``HOST:PORT`` on which the model party serves; port 0 takes a free one.
        host: Name or address by which the nodes reach it.
        tls_certificate: Its certificate (PEM); empty makes an authority for this run, which nobody has afterwards.
        tls_key: The certificate's key.
        tls_ca: The authority that signed it.
        node_timeout: Seconds after which a node that is silent in the middle of its work is taken for gone.
        round_timeout: Seconds that a round may take.
        device: Where the model party computes: ``cpu``, ``cuda``.
    """

    model: str
    gguf_file: str = ""
    partition: str = "2,2"
    rounds: int = _positive(1)
    steps: int = _positive(10)
    batch_size: int = _positive(4)
    learning_rate: float = field(default=1e-3, validator=validators.gt(0))
    max_length: int = field(default=64, validator=validators.ge(2))
    lora_r: int = _positive(8)
    lora_alpha: float = field(default=16.0, validator=validators.gt(0))
    lora_dropout: float = field(default=0.0, validator=[validators.ge(0), validators.lt(1)])
    seed: int = 0
    sharing: Literal["mean", "turns"] = field(
        default="mean", validator=validators.in_(("mean", "turns"))
    )
    average: bool = False
    min_nodes: int = _positive(2)
    folder: str = ""
    listen: str = "127.0.0.1:0"
    host: str = "127.0.0.1"
    tls_certificate: str = ""
    tls_key: str = ""
    tls_ca: str = ""
    node_timeout: float = field(default=120.0, validator=validators.gt(0))
    round_timeout: float = field(default=3600.0, validator=validators.gt(0))
    device: str = "cpu"

    def __attrs_post_init__(self) -> None:
        self.cut()
        files = (self.tls_certificate, self.tls_key, self.tls_ca)
        if any(files) and not all(files):
            raise ExperimentError(
                "Give tls-certificate, tls-key and tls-ca together, or none of them: then an authority is made for this run."
            )

    def cut(self) -> Partition:
        """The cut that `partition` means.

        Raises:
            ExperimentError: It means none.
        """
        head, _, tail = self.partition.partition(",")
        if not head.strip().isdecimal() or not tail.strip().isdecimal():
            raise ExperimentError(
                f"partition = {self.partition!r} is no cut. Write HEAD,TAIL: the blocks that a data party keeps at either "
                'end, as "2,2".'
            )
        return Partition(head=int(head), tail=int(tail))

    def loading(self) -> dict[str, Any]:
        """How each party loads its half."""
        return {"gguf_file": self.gguf_file} if self.gguf_file else {}

    def lora(self) -> Lora:
        """The adapters that both parties put into their halves."""
        return Lora(r=self.lora_r, alpha=self.lora_alpha, dropout=self.lora_dropout)

    def train(self) -> Train:
        """How the data parties fine-tune, over all rounds."""
        return Train(
            steps=self.rounds * self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            max_length=self.max_length,
            lora=self.lora(),
        )


@frozen
class NodeOptions:
    """What belongs to a data party alone, and is never sent.

    Attributes:
        data: File of its records: JSON lines (``.jsonl``), CSV (``.csv``), or a record a line.
        text: Column of the text, of JSON lines and CSV.
        folder: Where its half of the run is kept between rounds, and lies at the end.
        share_adapters: Allow that its adapters are sent to Flower, if the run asks for that.
    """

    data: str
    text: str = "text"
    folder: str = field(kw_only=True)
    share_adapters: bool = False

    def of_run(self, run: int) -> Path:
        """The folder of one run."""
        return Path(self.folder) / f"run-{run}"


def read_run_options(config: Values) -> RunOptions:
    """Read a run config.

    Raises:
        ExperimentError: An option is missing, misspelt, or has a value that it cannot have.
    """
    return _read(
        RunOptions, config, "run config ([tool.flwr.app.config], or flwr run --run-config)"
    )


def read_node_options(config: Values) -> NodeOptions:
    """Read a node config.

    Raises:
        ExperimentError: As `read_run_options`.
    """
    return _read(NodeOptions, config, "node config (flower-supernode --node-config)")


def _read(kind: type[Record], config: Values, where: str) -> Record:
    """A record of what stands in a config, whose keys have dashes for underscores."""
    fields = {each.name.replace("_", "-"): each for each in attrs.fields(kind)}  # type: ignore[arg-type]
    for key in config:
        if key not in fields:
            raise ExperimentError(f"There is no {key!r} in a {where}.{alternatives(key, fields)}")
    given: dict[str, Any] = {}
    for key, each in fields.items():
        if key not in config:
            if each.default is attrs.NOTHING:
                raise ExperimentError(f"Give {key!r} in the {where}.")
            continue
        given[each.name] = _typed(key, config[key], each.type, where)
    try:
        return kind(**given)
    except ValueError as error:
        raise ExperimentError(f"In the {where}: {error.args[0]}") from error


def _typed(key: str, value: Any, wanted: Any, where: str) -> Any:
    """The value, if it is of the type that its field has; whole numbers are numbers."""
    name = wanted if isinstance(wanted, str) else getattr(wanted, "__name__", str(wanted))
    if name == "float" and type(value) is int:
        return float(value)
    expected = {"int": int, "float": float, "bool": bool}.get(name, str)
    if type(value) is not expected:
        raise ExperimentError(
            f"{key} = {value!r} in the {where} must be a {expected.__name__}, not a {type(value).__name__}."
        )
    return value
