"""One party's half of a checkpoint, loaded without ever holding the other's.

transformers' own `from_pretrained` does the work, on a subclass of the architecture whose `__init__` puts
an empty module where a weight is not ours: so dtype, device_map, quantisation, shards, revisions and the
conversion of old keys are its business. What is ours is found on a model without weights, from the config.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch
from attrs import frozen
from safetensors import SafetensorError
from torch import nn

from vflair_core.communication.channel import Channel, Handler
from vflair_core.communication.wire_dtype import WireDtype
from vflair_core.errors import CheckpointError, PartitionError
from vflair_core.parties.channels import open_channel
from vflair_core.parties.checkpoint_source import Source, find_source
from vflair_core.parties.data_party.party import DataParty
from vflair_core.parties.load_adapter import load_half
from vflair_core.parties.model_party.party import ModelParty
from vflair_core.partition.adapters import check_peft
from vflair_core.partition.block_discovery import locate_blocks
from vflair_core.partition.fingerprint import fingerprint
from vflair_core.partition.module_tree import (
    empty_others,
    hollow,
    inside,
    names_by_weight,
    on_meta,
    outside,
    owners,
    replace_module,
    take,
)
from vflair_core.partition.partition import Partition, called_here
from vflair_core.partition.slices import Slices
from vflair_core.partition.stages import Stage, names_in, stages

if TYPE_CHECKING:
    import pluggy
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from vflair_core.defenses.defense import Defense


def load_data_party(
    name: str | Path,
    partition: Partition | None = None,
    *,
    channel: Channel | Handler | str,
    auto: Any = None,
    new: Sequence[str] = (),
    defenses: Sequence[Defense] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    adapter: str | Path | None = None,
    wire: bool = False,
    wire_dtype: WireDtype = "float32",
    seed: int | None = None,
    plugins: pluggy.PluginManager | None = None,
    **options: Any,
) -> DataParty:
    """Load the data party's half of a checkpoint, and open its session with the model party.

    Args:
        name: A folder, a model of the Hugging Face hub, or ``package:NAME/FOLDER`` (`locate_checkpoint`).
        partition: The cut; by default two blocks at either end.
        channel: The way to the model party: its `handle` in one process, ``"grpc://HOST:PORT"`` (`connect`), a
            `Channel`, or a URL that a plugin opens.
        auto: A class to load with, e.g. ``AutoModelForSequenceClassification``; by default the
            architecture that the config names.
        new: Modules that the checkpoint lacks and that start at random, e.g. ``["score"]``.
        defenses: Applied in this order on the way out, in reverse on the way back.
        tokenizer: Needed for `DataParty.encode` and `ask` only; by default the one that lies beside the weights, if
            there is one.
        adapter: A peft adapter of the whole model, whose half is loaded too (`load_adapter`).
        wire: With a `handle`, pass every message through the codec.
        wire_dtype: Round hidden states and their gradients on their way, to ``bfloat16`` or ``int8``; with a `handle` it
            needs `wire`.
        seed: Seed of the defenses' noise; None draws it from the operating system.
        plugins: Asked for blocks that cannot be found and for channels.
        options: Of `from_pretrained`: dtype, device_map, revision, attn_implementation, gguf_file, …, and of the
            config.

    Raises:
        CheckpointError: There is no such checkpoint, package or GGUF file, or it lacks weights of this half.
        PartitionError: The blocks cannot be found, or the cut leaves the legal range.
        ProtocolError: The model party holds another model, other weights or another cut.
        ChannelError: The model party cannot be reached.
        VflairError: `adapter` is given, and peft is not installed.
    """
    if adapter is not None:
        check_peft()
    plan = _plan(name, partition, auto, plugins, options)
    skeletons: dict[str, nn.Module] = {}

    def keep_ours(model: nn.Module) -> None:
        skeletons.update({name: on_meta(model.get_submodule(name)) for name in plan.absent})
        empty_others(model, outside(model, plan.remote) | owners(plan.untied))

    model = _load(plan, keep_ours, new, owned=lambda key: not inside(key, plan.remote))
    for skeleton in skeletons.values():
        skeleton.eval()  # as `from_pretrained` leaves the model
    data_party = DataParty(
        model,
        plan.partition,
        way := open_channel(channel, plugins, wire=wire, wire_dtype=wire_dtype),
        plan.cut,
        plan.fingerprint(model),
        skeletons,
        order=plan.order,
        slices=plan.slices,
        local=plan.local,
        untied=tuple(plan.untied),
        defenses=defenses,
        tokenizer=tokenizer or _tokenizer_beside(plan.source),
        seed=seed,
    )
    try:
        if adapter is not None:
            load_half(data_party.model, adapter, elsewhere=data_party.absent)
        data_party.open()
    except BaseException:
        way.close()
        raise
    return data_party


def load_model_party(
    name: str | Path,
    partition: Partition | None = None,
    *,
    auto: Any = None,
    new: Sequence[str] = (),
    share: tuple[int, int | None] | None = None,
    onward: Channel | Handler | str | None = None,
    adapter: str | Path | None = None,
    plugins: pluggy.PluginManager | None = None,
    **options: Any,
) -> ModelParty:
    """Load the model party's half of a checkpoint: its blocks and, in HT, what comes after them.

    In a chain of model parties each loads its `share`; start with the last, for each opens the way to the next
    when a data party opens a session.

    Args:
        name: A folder, a model of the Hugging Face hub, or ``package:NAME/FOLDER`` (`locate_checkpoint`).
        partition: The cut, the same as the data party's.
        auto: A class to load with, the same as the data party's.
        new: Modules that the checkpoint lacks and that start at random, e.g. ``["score"]`` in HT.
        share: Of the blocks of all model parties, those of this one: (first, last + 1), counted from 0. None for
            the last + 1 takes all that follow and what comes after the blocks.
        onward: The way to the next party of the chain, for all but the last: as `channel` of `load_data_party`.
        adapter: A peft adapter of the whole model, whose half is loaded too (`load_adapter`).
        plugins: Asked for blocks that cannot be found and for channels.
        options: Of `from_pretrained`: dtype, device_map, revision, quantization_config, gguf_file, …, and of the
            config.

    Raises:
        CheckpointError: There is no such checkpoint, package or GGUF file, or it lacks weights of this half.
        PartitionError: The blocks cannot be found, or the cut or the share leaves the legal range.
        VflairError: `adapter` is given, and peft is not installed.
    """
    if adapter is not None:
        check_peft()
    plan = _plan(name, partition, auto, plugins, options)
    cut = plan.cut if share is None else _shared_out(plan.cut, *share, last=onward is None)
    ours = names_in(cut)
    untied = {mine: tied for mine, tied in plan.untied.items() if inside(mine, ours)}
    twins = owners(twin for tied in untied.values() for twin in tied)

    def keep_ours(model: nn.Module) -> None:
        empty_others(model, set(ours) | twins)

    model = _load(plan, keep_ours, new, owned=lambda key: inside(key, ours))
    for twin in twins:
        if not inside(twin, ours):
            replace_module(
                model, twin, nn.Module()
            )  # the tied weight has been read; it is ours alone now
    held, _ = take(model, ours, frozenset(plan.local))
    model_party = ModelParty(held, cut, plan.fingerprint(model), plan.slices, model.config)
    if adapter is not None:
        load_half(held, adapter, elsewhere=None)
    if onward is not None:
        model_party.pass_on(cut, open_channel(onward, plugins, wire=False))
    return model_party


def _shared_out(
    cut: Sequence[Stage], first: int, end: int | None, *, last: bool
) -> tuple[Stage, ...]:
    """What one party of a chain runs of each stage."""
    shortest = min(len(stage.blocks) for stage in cut)
    if not 0 <= first < (shortest if end is None else min(end, shortest)) or last != (end is None):
        raise PartitionError(
            f"share=({first}, {end}) is no share of {shortest} blocks. The model parties of a chain take blocks one "
            f"after the other, each at least one: e.g. share=(0, {shortest // 2}) with onward= the way to the next "
            f"party, and share=({shortest // 2}, None) for the last, which has no onward."
        )
    return tuple(
        Stage(stage.blocks[first:end], () if end is not None else stage.rest, stage.optional)
        for stage in cut
    )


def _tokenizer_beside(source: Source) -> PreTrainedTokenizerBase | None:
    """The tokenizer that was saved with the weights, if one was.

    Raises:
        CheckpointError: It cannot be read.
    """
    from transformers import AutoTokenizer
    from transformers.utils.hub import cached_file

    named = {"_raise_exceptions_for_missing_entries": False, **source.place}
    named.pop("trust_remote_code", None), named.pop("code_revision", None)
    if cached_file(source.name, "tokenizer_config.json", **named) is None:
        return None
    try:
        return AutoTokenizer.from_pretrained(source.name, **source.place)  # type: ignore[no-any-return]
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"The tokenizer beside {source.name} cannot be read: {error} Pass tokenizer=..."
        ) from error


@frozen(eq=False)
class Plan:
    """What both parties work out alike from the config, before a weight is read."""

    source: Source
    partition: Partition
    architecture: type[PreTrainedModel]
    cut: tuple[Stage, ...]
    local: Mapping[str, tuple[bool, ...]]  # blocks that both parties need
    order: tuple[str, ...]
    slices: Slices
    untied: Mapping[
        str, tuple[str, ...]
    ]  # the model party's weight → the data party's it was tied to

    @property
    def absent(self) -> tuple[str, ...]:
        """The modules that the model party holds."""
        return names_in(self.cut)

    @property
    def remote(self) -> tuple[str, ...]:
        """The modules that only the model party holds."""
        return tuple(name for name in self.absent if name not in self.local)

    def fingerprint(self, model: PreTrainedModel) -> str:
        """What the other party must have too; the dtype is known once the weights are."""
        config = self.source.config
        return fingerprint(
            self.architecture.__name__,
            config,
            self.partition,
            self.source.weights,
            dtype=model.config.dtype,
        )


def _plan(
    name: str | Path,
    partition: Partition | None,
    auto: Any,
    plugins: pluggy.PluginManager | None,
    options: Mapping[str, Any],
) -> Plan:
    partition = partition or Partition()
    source = find_source(name, auto, options)
    try:
        with torch.device("meta"):
            shadow = source.empty_model()
    except (ImportError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{name} cannot be built with these options: {error}") from error
    hollow(shadow)
    stacks = locate_blocks(shadow, plugins)
    cut = stages(shadow, stacks, partition)
    local = called_here(shadow, stacks, partition)
    order = tuple(name for name, _ in shadow.named_parameters())
    slices = Slices.find(shadow, stacks, cut, partition)
    plan = Plan(source, partition, type(shadow), cut, local, order, slices, {})
    return attrs.evolve(plan, untied=_tied_across(shadow, plan))


def _tied_across(model: nn.Module, plan: Plan) -> dict[str, tuple[str, ...]]:
    tied: dict[str, tuple[str, ...]] = {}
    for group in names_by_weight(model):
        theirs = [name for name in group if inside(name, plan.absent)]
        ours = tuple(name for name in group if not inside(name, plan.remote))
        if ours:
            tied |= dict.fromkeys(theirs, ours)
    return tied


def _load(plan: Plan, keep_ours: Any, new: Sequence[str], *, owned: Any) -> PreTrainedModel:
    """Run `from_pretrained` on the architecture with other parties' modules emptied by `keep_ours`."""
    architecture: Any = plan.architecture

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807 - it becomes one
        architecture.__init__(self, *args, **kwargs)
        keep_ours(self)
        present = {name for name, _ in self.named_parameters(remove_duplicate=False)}
        ties = self.all_tied_weights_keys.items()
        self.all_tied_weights_keys = {a: b for a, b in ties if a in present and b in present}
        self._keys_to_ignore_on_load_unexpected = {""}  # the other party's weights

    members = {"__init__": __init__, "__module__": architecture.__module__}
    half: Any = type(architecture.__name__, (architecture,), members)
    try:
        model, info = half.from_pretrained(
            plan.source.name,
            config=plan.source.config,
            output_loading_info=True,
            **plan.source.options,
        )
    except SafetensorError as error:
        raise CheckpointError(
            f"{plan.source.name} cannot be loaded, as a file of its weights is damaged or cut short: {error}. Copy or download it "
            "again; a folder in the cache of vflair can be deleted, and is made anew."
        ) from error
    except (AssertionError, ImportError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{plan.source.name} cannot be loaded: {error}") from error
    model.__class__ = architecture
    missing = sorted(key for key in info["missing_keys"] if owned(key) and not inside(key, new))
    if missing:
        raise CheckpointError(
            f"{plan.source.name} lacks {len(missing)} weights of this half of {architecture.__name__}: "
            f"{', '.join(missing[:6])}. Load the class that was saved ({plan.source.saved_as}), or, if they "
            f"should start at random, pass new={sorted({key.split('.')[0] for key in missing})!r}."
        )
    return model  # type: ignore[no-any-return]
