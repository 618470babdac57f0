"""A model in memory cut in two.

HT (head | tail): the data party holds the embeddings and the first `head` blocks; the model party holds
everything after them and returns logits. HBT (head | body | tail): the model party holds only middle
blocks; the last `tail` blocks, the final norm and the task head stay with the data party.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from vflair_core.errors import PartitionError
from vflair_core.parties.channels import open_channel
from vflair_core.parties.data_party.party import DataParty
from vflair_core.parties.model_party.party import ModelParty
from vflair_core.partition.block_discovery import locate_blocks
from vflair_core.partition.fingerprint import fingerprint, sample_digest, weights_in
from vflair_core.partition.slices import Slices
from vflair_core.partition.stages import names_in, stages
from vflair_core.plugins import decide, observe

if TYPE_CHECKING:
    import pluggy
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from vflair_core.defenses.defense import Defense

from vflair_core.partition.module_tree import take
from vflair_core.partition.partition import Partition, called_here


def split(
    model: PreTrainedModel,
    partition: Partition | None = None,
    *,
    defenses: Sequence[Defense] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    channel: str = "local:",
    wire: bool = False,
    devices: Sequence[str] = (),
    seed: int | None = None,
    plugins: pluggy.PluginManager | None = None,
    model_party: ModelParty | None = None,
) -> tuple[DataParty, ModelParty]:
    """Cut `model` in two. Its weights move into the parties: do not use it afterwards.

    Args:
        model: Any transformers model with a list of blocks.
        partition: The cut; by default two blocks at either end.
        defenses: Applied in this order on the way out, in reverse on the way back.
        tokenizer: Needed for `DataParty.encode` and `ask` only.
        channel: Where messages go: ``"local:"``, or a URL that a plugin opens.
        wire: Pass every message through the codec, as a remote channel would.
        devices: Where the model party computes; with more than one, a plugin places it.
        seed: Seed of the defenses' noise; None draws it from the operating system.
        plugins: Asked for the blocks of a model whose blocks cannot be found.
        model_party: One that exists, to join as a further data party: its weights are used, and those that `model`
            has in their place are dropped.

    Raises:
        PartitionError: The blocks cannot be found, or the cut leaves the legal range.
        ProtocolError: `model_party` was cut from another model, or in another place.
    """
    partition = partition or Partition()
    refuse_wrapped(model)
    stacks = locate_blocks(model, plugins)
    cut = stages(model, stacks, partition)
    local = called_here(model, stacks, partition)
    order = tuple(name for name, _ in model.named_parameters())
    slices = Slices.find(model, stacks, cut, partition)
    # Who joins an existing model party uses its weights, whatever `model` has in their place.
    weights = weights_in(model_party.fingerprint) if model_party else sample_digest(model)
    agreed = fingerprint(type(model).__name__, model.config, partition, weights, dtype=model.dtype)
    held, untied = take(model, names_in(cut), frozenset(local))
    if model_party is None:
        model_party = ModelParty(held, cut, agreed)
        model_party.slices = slices
        _place(model_party, devices, plugins)
    data_party = DataParty(
        model,
        partition,
        open_channel(channel, plugins, wire=wire, handle=model_party.handle),
        cut,
        agreed,
        {name: held.get_submodule(name) for name in names_in(cut)},
        order=order,
        local=local,
        untied=untied,
        slices=slices,
        defenses=defenses,
        tokenizer=tokenizer,
        seed=seed,
    )
    data_party.open()
    observe(
        plugins,
        "vflair_model_partitioned",
        partition=partition,
        data_party_weights=sum(p.numel() for p in data_party.parameters()),
        model_party_weights=sum(p.numel() for p in model_party.parameters()),
    )
    return data_party, model_party


def _place(
    model_party: ModelParty, devices: Sequence[str], plugins: pluggy.PluginManager | None
) -> None:
    if len(devices) == 1:
        model_party.model.to(devices[0])
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
