"""Where a model is cut, and the cut itself.

HT (head | tail): the data party holds the embeddings and the first `head` blocks; the model party holds
everything after them and returns logits. HBT (head | body | tail): the model party holds only middle
blocks; the last `tail` blocks, the final norm and the task head stay with the data party.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from attrs import field, frozen
from torch import nn

from vflair_core.communication.channel import LocalChannel
from vflair_core.errors import PartitionError, ProtocolError
from vflair_core.parties.assembly import assemble, open_channel
from vflair_core.parties.data_party.party import DataParty
from vflair_core.parties.model_party.party import ModelParty
from vflair_core.partition.block_discovery import locate_blocks
from vflair_core.partition.fingerprint import fingerprint, sample_digest, weights_in
from vflair_core.partition.slices import Slices
from vflair_core.partition.stages import Blocks, stages
from vflair_core.plugins import decide, observe
from vflair_core.stage import Stage
from vflair_core.wrapping import refuse_wrapped

if TYPE_CHECKING:
    import pluggy
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from vflair_core.defenses.defense import Defense


def _not_negative(_instance: object, attribute: Any, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise PartitionError(
            f"{attribute.name} must be a whole number of blocks >= 0, not {value!r}; "
            "try Partition(head=2, tail=2)."
        )


@frozen
class Partition:
    """How many blocks the data party keeps at either end.

    Args:
        head: Blocks after the embeddings.
        tail: Blocks before the final norm; 0 gives norm and task head to the model party (HT).
        disclose: Names of tensors that depend on the text and may cross all the same, although they are
            not hidden states. Everything of that sort is refused unless named here, and the name is recorded.
    """

    head: int = field(default=2, validator=_not_negative)
    tail: int = field(default=2, validator=_not_negative)
    disclose: tuple[str, ...] = field(default=(), converter=tuple)

    @property
    def kind(self) -> Literal["HT", "HBT"]:
        """HT when the model party holds the end of the model, HBT when it holds only the middle."""
        return "HBT" if self.tail else "HT"


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
    held, untied = _take(model, cut, frozenset(local))
    if model_party is None:
        model_party = ModelParty(held, cut, agreed)
        model_party.slices = slices
        _place(model_party, devices, plugins)
    data_party = assemble(
        model,
        partition,
        open_channel(channel, plugins, wire=wire, handle=model_party.handle),
        cut,
        {name: held.get_submodule(name) for stage in cut for name in stage.names},
        agreed,
        order=order,
        local=local,
        untied=untied,
        slices=slices,
        defenses=defenses,
        tokenizer=tokenizer,
        seed=seed,
    )
    observe(
        plugins,
        "vflair_model_partitioned",
        partition=partition,
        data_party_weights=sum(p.numel() for p in data_party.parameters()),
        model_party_weights=sum(p.numel() for p in model_party.parameters()),
    )
    return data_party, model_party


def divide(model_party: ModelParty, blocks: int, *, wire: bool = False) -> ModelParty:
    """Make a chain of a model party: it keeps its first `blocks` blocks (of each stack), a new one gets the rest.

    The data party goes on talking to the first, which talks to the new one. Each has its own weights, optimizer,
    caches and checkpoints; set `sharing` and `checkpoints` at both.

    Args:
        model_party: Before it trains. It may be divided again, and so may the new one.
        blocks: How many it keeps.
        wire: Pass every message between the two through the codec.

    Returns:
        The new model party.

    Raises:
        PartitionError: One of the two would have no block, or they would share weights.
        ProtocolError: A session trains already.
    """
    stages = [chain.stage for chain in model_party.chains]
    shortest = min(len(stage.blocks) for stage in stages)
    if not 1 <= blocks < shortest:
        raise PartitionError(
            f"Cannot keep {blocks} of {shortest} blocks: both parties of a chain need one. "
            + (
                f"Possible: 1 to {shortest - 1}."
                if shortest > 1
                else "Nothing can be divided here."
            )
        )
    if model_party.onward is not None:
        raise PartitionError("This party passes on already: divide the last one of the chain.")
    if any(session.trains or session.graphs for session in model_party.sessions.values()):
        raise ProtocolError("A data party trains already: divide the model party before.")
    kept = [Stage(s.blocks[:blocks], (), s.optional) for s in stages]
    given = [Stage(s.blocks[blocks:], s.rest, s.optional) for s in stages]
    mine, theirs = (
        dict.fromkeys(n for stage in part for n in stage.names) for part in (kept, given)
    )
    ours = {id(p) for n in mine for p in model_party.model.get_submodule(n).parameters()}
    tree = nn.Module()
    tree.training = model_party.model.training
    for name in theirs:
        module = model_party.model.get_submodule(name)
        if name in mine or any(id(p) in ours for p in module.parameters()):
            raise PartitionError(
                f"{name} shares weights with blocks of the first party, and no weight has two owners."
            )
    for name in theirs:
        _plant(tree, name, model_party.model.get_submodule(name))
        parent, _, leaf = name.rpartition(".")
        delattr(model_party.model.get_submodule(parent), leaf)
    other = ModelParty(tree, given, model_party.fingerprint)
    other.slices = model_party.slices
    model_party.pass_on(kept, LocalChannel(other.handle, wire=wire))
    return other


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


def called_here(
    model: nn.Module, stacks: Sequence[Blocks], partition: Partition
) -> dict[str, tuple[bool, ...]]:
    """Blocks that both parties need (ALBERT's share weights): for each call, whether it is made here."""
    here: dict[str, list[bool]] = {}
    for stack in stacks:
        calls = stack.called(model)
        for number, block in enumerate(calls):
            middle = partition.head <= number < len(calls) - partition.tail
            for name in block:
                here.setdefault(name, []).append(not middle)
    return {name: tuple(made) for name, made in here.items() if len(set(made)) > 1}


def _take(
    model: nn.Module, cut: Sequence[Stage], local: frozenset[str]
) -> tuple[nn.Module, tuple[str, ...]]:
    """Return a tree with the modules of `cut` under their own names, and the weights that had to be untied.

    A weight that both sides use gets a copy at the model party: no weight has two owners.
    """
    names = tuple(dict.fromkeys(name for stage in cut for name in stage.names))
    inside = {id(p) for name in names for p in model.get_submodule(name).parameters()}
    prefixes = tuple(name + "." for name in names if name not in local)
    outside = {
        id(p)
        for name, p in model.named_parameters(remove_duplicate=False)
        if not name.startswith(prefixes)
    }
    shared = inside & outside
    held, untied = nn.Module(), []
    held.training = model.training  # what `ModelParty` compares a request with
    for name in names:
        module = model.get_submodule(name)
        if name in local:
            module = copy.deepcopy(module)
            untied += [f"{name}.{key}" for key, _ in module.named_parameters()]
        for key, parameter in list(module.named_parameters(remove_duplicate=False)):
            if id(parameter) in shared:
                parent, _, leaf = key.rpartition(".")
                setattr(module.get_submodule(parent), leaf, copy.deepcopy(parameter))
                untied.append(f"{name}.{key}")
        _plant(held, name, module)
    return held, tuple(untied)


def _plant(tree: nn.Module, name: str, module: nn.Module) -> None:
    *path, leaf = name.split(".")
    for part in path:
        if part not in tree._modules:
            tree.add_module(part, nn.Module())
        tree = tree._modules[part]  # type: ignore[assignment]
    tree.add_module(leaf, module)
