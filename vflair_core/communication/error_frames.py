"""Errors as bytes, where a message was due: the class of one and its words."""

from __future__ import annotations

from typing import Any

import msgpack

from vflair_core import errors
from vflair_core.errors import ProtocolError, VflairError

ERROR = b"x"  # what such a frame begins with; a message begins with another letter
SMALL = 2**16  # bytes of one
LONGEST_TEXT = 2000  # characters of an error


def error_frame(error: VflairError) -> bytes:
    """Write an error: its class and its words."""
    return ERROR + msgpack.packb([type(error).__name__, str(error)[:LONGEST_TEXT]])


def read_error(frame: bytes) -> VflairError:
    """Read an error: of the same class, where vflair has one of that name, else a `ProtocolError`."""
    match unpacked(frame[1:]) if len(frame) <= SMALL else None:
        case [str() as name, str() as text]:
            kind = getattr(errors, name, None)
            known = isinstance(kind, type) and issubclass(kind, VflairError)
            made: VflairError = kind(text) if known and kind is not None else ProtocolError(text)
            return made
        case _:
            return ProtocolError("The other side reports an error in a form that cannot be read.")


def unpacked(packed: bytes) -> Any:
    """Read msgpack of the other side; None where it is none."""
    try:
        return msgpack.unpackb(packed, raw=False)
    except (ValueError, msgpack.UnpackException):
        return None
