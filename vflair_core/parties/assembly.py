"""Putting a data party together, however its weights came: from a model in memory or from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn

from vflair_core.communication.channel import Channel, LocalChannel
from vflair_core.errors import ProtocolError
from vflair_core.parties.data_party.party import DataParty
from vflair_core.parties.data_party.recorder import Recorder
from vflair_core.parties.data_party.scored_positions import SCORED
from vflair_core.parties.data_party.stubs import ModuleStub, call_here_and_there
from vflair_core.partition.slices import Slices
from vflair_core.partition.stages import Stage
from vflair_core.plugins import decide

if TYPE_CHECKING:
    import pluggy
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from vflair_core.communication.channel import Handler
    from vflair_core.defenses.defense import Defense
    from vflair_core.partition.partition import Partition


def assemble(
    model: PreTrainedModel,
    partition: Partition,
    channel: Channel,
    cut: tuple[Stage, ...],
    absent: Mapping[str, nn.Module],
    fingerprint: str,
    *,
    order: tuple[str, ...],
    slices: Slices,
    local: Mapping[str, tuple[bool, ...]],
    untied: tuple[str, ...] = (),
    defenses: Sequence[Defense] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int | None = None,
) -> DataParty:
    """Put stand-ins where `absent` modules were and open the session.

    Args:
        model: Keeps its local modules; what lies at the names of `absent` is replaced.
        partition: The cut.
        channel: The way to the model party.
        cut: What the model party runs at a time.
        absent: The modules of `cut` by name; only their structure is used.
        fingerprint: The model party must have the same.
        order: Names of all weights, in the order of the whole model.
        slices: Which part of the model each weight belongs to.
        local: Blocks that both parties need: for each call, whether it is made here.
        untied: Weights that got a second copy because both sides use them.
        defenses: As in `split`.
        tokenizer: As in `split`.
        seed: As in `split`.

    Raises:
        ProtocolError: The model party has another fingerprint.
    """
    data_party = DataParty(
        model,
        partition,
        channel,
        cut,
        fingerprint,
        defenses=defenses,
        tokenizer=tokenizer,
        seed=seed,
        untied=untied,
    )
    data_party.order, data_party.slices = order, slices
    recorder = Recorder(data_party.exchange, cut, picks=SCORED in partition.disclose)
    data_party.recorder = recorder
    for name in data_party.absent:
        recorder.absent[name] = ModuleStub(name, absent[name], recorder)
        if name in local:
            call_here_and_there(model.get_submodule(name), recorder.absent[name], local[name])
        else:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, recorder.absent[name])
    data_party.open()
    return data_party


def open_channel(
    channel: Channel | Handler | str,
    plugins: pluggy.PluginManager | None,
    *,
    wire: bool,
    handle: Handler | None = None,
) -> Channel:
    """Return the channel that is meant: one that is open, a model party's `handle`, or a URL.

    Raises:
        ProtocolError: No plugin opens the URL.
    """
    if isinstance(channel, Channel):
        return channel
    if not isinstance(channel, str):
        return LocalChannel(channel, wire=wire)
    if channel == "local:" and handle is not None:
        return LocalChannel(handle, wire=wire)
    answer: Channel | None = None
    if plugins is not None:
        options = {"handle": handle, "wire": wire}
        answer = decide(plugins, "vflair_open_channel", url=channel, options=options)
    if answer is None:
        raise ProtocolError(
            f"No plugin opens the channel {channel!r}. Use 'local:' with split, a model party's handle with "
            "load_data_party, or install a plugin that answers vflair_open_channel(url, options) for it."
        )
    return answer
