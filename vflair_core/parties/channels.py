"""Which channel is meant: one that is open, a model party in this process, a server, or a URL that a plugin opens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vflair_core.communication.channel import Channel, LocalChannel
from vflair_core.communication.wire_dtype import WireDtype
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
    wire_dtype: WireDtype = "float32",
    handle: Handler | None = None,
) -> Channel:
    """Return the channel that is meant: one that is open, a model party's `handle`, or a URL.

    `wire` and `wire_dtype` are for a channel that is made here: as `LocalChannel` has them.

    Raises:
        ChannelError: The server that a ``grpc://`` URL names cannot be reached.
        ProtocolError: No plugin opens the URL, the server speaks otherwise than this side, or the channel does not round
            to `wire_dtype`.
    """
    if isinstance(channel, Channel):
        return _rounding(channel, wire_dtype)
    if not isinstance(channel, str):
        return LocalChannel(channel, wire=wire, wire_dtype=wire_dtype)
    if channel == "local:" and handle is not None:
        return LocalChannel(handle, wire=wire, wire_dtype=wire_dtype)
    if channel.startswith("grpc:"):
        # Only now: it brings structlog, and that rich.
        from vflair_core.communication.remote.client import connect

        return connect(channel, wire_dtype=None if wire_dtype == "float32" else wire_dtype)
    answer: Channel | None = None
    if plugins is not None:
        options = {"handle": handle, "wire": wire, "wire_dtype": wire_dtype}
        answer = decide(plugins, "vflair_open_channel", url=channel, options=options)
    if answer is None:
        raise ProtocolError(
            f"No plugin opens the channel {channel!r}. Use 'local:' with split, a model party's handle with "
            "load_data_party, 'grpc://HOST:PORT' for a server, or install a plugin that answers vflair_open_channel(url, options) for it."
        )
    return _rounding(answer, wire_dtype)


def _rounding(channel: Channel, wire_dtype: WireDtype) -> Channel:
    if wire_dtype not in ("float32", channel.wire_dtype):
        raise ProtocolError(
            f"The channel rounds to {channel.wire_dtype}, and {wire_dtype} was asked for. Open it with this wire dtype, or "
            "leave wire_dtype out."
        )
    return channel
