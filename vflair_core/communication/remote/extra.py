"""gRPC, which only this room needs: asked for when it is used, and named as the extra it comes with."""

from __future__ import annotations

import os
from typing import Any

from vflair_core.errors import ChannelError


def import_grpc() -> Any:
    """Return the module `grpc`.

    Raises:
        ChannelError: It is not installed.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what it says of failures, errors say in words
    try:
        import grpc
    except ImportError as error:
        raise ChannelError(
            "A channel between machines needs gRPC, which is not installed. Install the extra: "
            "pip install 'vflair-core[grpc]'."
        ) from error
    return grpc
