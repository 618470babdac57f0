"""A model in memory cut in two.

HT (head | tail): the data party holds the embeddings and the first `head` blocks; the model party holds
everything after them and returns logits. HBT (head | body | tail): the model party holds only middle
blocks; the last `tail` blocks, the final norm and the task head stay with the data party.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from attrs import frozen
from torch import nn

from vflair_core.communication.channel import Channel, LocalChannel
from vflair_core.communication.wire_dtype import WireDtype
from vflair_core.errors import PartitionError
from vflair_core.parties.channels import open_channel
from vflair_core.parties.data_party.party import DataParty
from vflair_core.parties.model_party.party import ModelParty
from vflair_core.partition.block_discovery import locate_blocks
from vflair_core.partition.fingerprint import fingerprint as fingerprint_of
from vflair_core.partition.fingerprint import sample_digest, weights_in
from vflair_core.partition.module_tree import take
from vflair_core.partition.partition import Partition, called_here
from vflair_core.partition.slices import Slices
from vflair_core.partition.stages import Stage, names_in, stages
from vflair_core.plugins import decide, observe

if TYPE_CHECKING:
    import pluggy
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from vflair_core.defenses.defense import Defense


def split(
    model: PreTrainedModel,
    partition: Partition | None = None,
    *,
    defenses: Sequence[Defense] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    channel: Channel | str = "local:",
    wire: bool = False,
    wire_dtype: WireDtype = "float32",
    devices: Sequence[str] = (),
    seed: int | None = None,
    fingerprint: str | None = None,
    plugins: pluggy.PluginManager | None = None,
) -> tuple[DataParty, ModelParty]:
    """Cut `model` in two. Its weights move into the parties: do not use it afterwards.

    Args:
        model: Any transformers model with a list of blocks.
        partition: The cut; by default two blocks at either end.
        defenses: Applied in this order on the way out, in reverse on the way back.
        tokenizer: Needed for `DataParty.encode` and `ask` only.
        channel: Where messages go: ``"local:"``, ``"grpc://HOST:PORT"`` (`connect`), a URL that a plugin opens, or an open
            channel. To a model party elsewhere: the one that is returned here only looks like it.
        wire: Pass every message through the codec, as a remote channel would.
        wire_dtype: Round hidden states and their gradients on their way; ``bfloat16`` or ``int8`` need `wire` or a channel
            between machines.
        devices: Where the model party computes; with more than one, a plugin places it.
        seed: Seed of the defenses' noise; None draws it from the operating system.
        fingerprint: Of model and cut, where the model party elsewhere names its weights otherwise than by what they are.
        plugins: Asked for the blocks of a model whose blocks cannot be found.

    Raises:
        PartitionError: The blocks cannot be found, or the cut leaves the legal range.
        ProtocolError: No plugin opens the channel, or the model party at its end holds another model.
        ChannelError: The model party cannot be reached.
    """
    cut = _Cut.through(model, partition or Partition(), plugins)
    agreed = fingerprint or cut.fingerprint(sample_digest(model))
    held, untied = take(model, names_in(cut.stages), frozenset(cut.local))
    model_party = ModelParty(held, cut.stages, agreed, cut.slices, model.config)
    _place(model_party, devices, plugins)
    data_party = cut.data_party(
        agreed,
        held,
        open_channel(channel, plugins, wire=wire, wire_dtype=wire_dtype, handle=model_party.handle),
        untied=untied,
        defenses=defenses,
        tokenizer=tokenizer,
        seed=seed,
    )
    _tell(plugins, data_party, model_party)
    return data_party, model_party


def join(
    model: PreTrainedModel,
    model_party: ModelParty,
    partition: Partition | None = None,
    *,
    defenses: Sequence[Defense] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    wire: bool = False,
    seed: int | None = None,
    plugins: pluggy.PluginManager | None = None,
) -> DataParty:
    """Make a further data party of a model party that exists: it keeps its own layers of `model`.

    The model party's weights are used, and those that `model` has in their place are dropped. Do not use `model`
    afterwards.

    Args:
        model: The same architecture as the model party's, with whatever weights.
        model_party: Made by `split` or `load_model_party`.
        partition: The cut, the same as the model party's.
        defenses: As in `split`.
        tokenizer: As in `split`.
        wire: As in `split`.
        seed: As in `split`.
        plugins: As in `split`.

    Raises:
        PartitionError: The blocks cannot be found, or the cut leaves the legal range.
        ProtocolError: `model_party` holds another architecture, or was cut in another place.
    """
    cut = _Cut.through(model, partition or Partition(), plugins)
    agreed = cut.fingerprint(weights_in(model_party.fingerprint))
    held, untied = take(model, names_in(cut.stages), frozenset(cut.local))
    data_party = cut.data_party(
        agreed,
        held,
        LocalChannel(model_party.handle, wire=wire),
        untied=untied,
        defenses=defenses,
        tokenizer=tokenizer,
        seed=seed,
    )
    _tell(plugins, data_party, model_party)
    return data_party


def _tell(
    plugins: pluggy.PluginManager | None, data_party: DataParty, model_party: ModelParty
) -> None:
    observe(
        plugins,
        "vflair_model_partitioned",
        partition=data_party.partition,
        data_party_weights=sum(p.numel() for p in data_party.parameters()),
        model_party_weights=sum(p.numel() for p in model_party.parameters()),
    )


@frozen(eq=False)
class _Cut:
    """Where a model in memory is cut, as both parties must know it before it is."""

    model: PreTrainedModel
    partition: Partition
    stages: tuple[Stage, ...]
    local: Mapping[str, tuple[bool, ...]]  # blocks that both parties need
    order: tuple[str, ...]
    slices: Slices

    @classmethod
    def through(
        cls, model: PreTrainedModel, partition: Partition, plugins: pluggy.PluginManager | None
    ) -> _Cut:
        refuse_wrapped(model)
        stacks = locate_blocks(model, plugins)
        cut = stages(model, stacks, partition)
        order = tuple(name for name, _ in model.named_parameters())
        slices = Slices.find(model, stacks, cut, partition)
        return cls(model, partition, cut, called_here(model, stacks, partition), order, slices)

    def fingerprint(self, weights: str) -> str:
        model = self.model
        return fingerprint_of(
            type(model).__name__, model.config, self.partition, weights, dtype=model.dtype
        )

    def data_party(
        self, agreed: str, held: nn.Module, channel: Channel, **options: Any
    ) -> DataParty:
        """Put stubs where the `held` modules were, and open the session."""
        party = DataParty(
            self.model,
            self.partition,
            channel,
            self.stages,
            agreed,
            {name: held.get_submodule(name) for name in names_in(self.stages)},
            local=self.local,
            order=self.order,
            slices=self.slices,
            **options,
        )
        try:
            party.open()
        except BaseException:
            channel.close()
            raise
        return party


def _place(
    model_party: ModelParty, devices: Sequence[str], plugins: pluggy.PluginManager | None
) -> None:
    if len(devices) == 1:
        try:
            model_party.model.to(devices[0])
        except (AssertionError, RuntimeError) as error:
            raise PartitionError(
                f"The model party cannot compute on {devices[0]!r}: {str(error).splitlines()[0]}"
            ) from error
    if len(devices) > 1:
        facts = {"model_party": model_party.model, "devices": list(devices)}
        if not (plugins and decide(plugins, "vflair_place", **facts)):
            raise PartitionError(
                f"No plugin places the model party on {', '.join(devices)}. Give one device, or install a "
                "plugin that answers vflair_place(model_party, devices)."
            )


# Named rather than imported: torch builds without torch.distributed lack most of them.
WRAPPERS = {
    "DataParallel": "split(model.module, ...)",
    "DistributedDataParallel": "split(model.module, ...)",
    "FullyShardedDataParallel": "split the model before it is sharded",
    "FSDPModule": "split the model before it is sharded",
    "DeepSpeedEngine": "split(engine.module, ...)",
    "OptimizedModule": "split the model before torch.compile",
}


def refuse_wrapped(model: nn.Module) -> None:
    """See that `model` is a transformers model as `from_pretrained` returns it, unwrapped and unquantised.

    Raises:
        PartitionError: It is not; the message names what holds it and what to do.
    """
    for module in model.modules():
        for kind in type(module).__mro__:
            if kind.__name__ in WRAPPERS:
                raise PartitionError(
                    f"Cannot cut a model inside {kind.__name__}: its weights are not the model's own any "
                    f"more. Instead: {WRAPPERS[kind.__name__]}."
                )
    quantiser = getattr(model, "hf_quantizer", None)
    if quantiser is not None:
        method = quantiser.quantization_config.quant_method
        raise PartitionError(
            f"Cannot cut a model that {getattr(method, 'value', method)} has quantised: packed weights have "
            "no stand-in. Instead: load_model_party(name, partition, quantization_config=...) quantises the "
            "model party's half as it is loaded."
        )
