"""Which channel is meant: one that is open, a model party in this process, or a URL that a plugin opens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vflair_core.communication.channel import Channel, LocalChannel
from vflair_core.errors import ProtocolError
from vflair_core.plugins import decide

if TYPE_CHECKING:
    import pluggy

    from vflair_core.communication.channel import Handler


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
