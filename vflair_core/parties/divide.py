"""A model party cut in two: a chain of model parties."""

from __future__ import annotations

from torch import nn

from vflair_core.communication.channel import LocalChannel
from vflair_core.errors import PartitionError, ProtocolError
from vflair_core.parties.model_party.party import ModelParty
from vflair_core.partition.module_tree import plant
from vflair_core.partition.stages import Stage


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
    stages = [held.stage for held in model_party.held]
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
    first = [Stage(s.blocks[:blocks], (), s.optional) for s in stages]
    given = [Stage(s.blocks[blocks:], s.rest, s.optional) for s in stages]
    mine, theirs = (
        dict.fromkeys(n for stage in part for n in stage.names) for part in (first, given)
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
        plant(tree, name, model_party.model.get_submodule(name))
        parent, _, leaf = name.rpartition(".")
        delattr(model_party.model.get_submodule(parent), leaf)
    other = ModelParty(tree, given, model_party.fingerprint, model_party.slices, model_party.config)
    model_party.pass_on(first, LocalChannel(other.handle, wire=wire))
    return other
