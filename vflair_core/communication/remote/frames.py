"""What lies in a stream: a greeting first, then messages of the codec in pieces, or an error in a message's place.

Each gRPC message is one frame: a byte that says what it is, then its content. All pieces of a message but its last are of
`PIECE` bytes, so that a peer cannot keep the other side busy with crumbs.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Iterator

import msgpack
from attrs import frozen

from vflair_core.communication.error_frames import ERROR, SMALL, read_error, unpacked
from vflair_core.communication.wire_dtype import WIRE_DTYPES, WireDtype, check_wire_dtype
from vflair_core.errors import ProtocolError

METHOD = "/vflair.ModelParty/Exchange"
VERSION = 1  # of what is written here and in `codec.py`
PIECE = 2**20  # bytes

INSTALLED = importlib.metadata.version("vflair-core")  # tells the other side what to install

HELLO, MORE, LAST = b"h", b"m", b"e"  # an error begins with `error_frames.ERROR`


@frozen
class Hello:
    """What each side says first: the client what it asks for, the server what is agreed."""

    vflair: str
    wire_dtype: WireDtype
    version: int = VERSION
    message_bytes: int = 0  # that the server takes of one message

    def frame(self) -> bytes:
        """Write it."""
        return HELLO + msgpack.packb(
            [self.version, self.vflair, self.wire_dtype, self.message_bytes]
        )

    @classmethod
    def read(cls, frame: bytes, *, here: str) -> Hello:
        """Read one, checking that its sender speaks as this side does.

        Args:
            frame: As it came.
            here: This side's version of vflair.

        Raises:
            ProtocolError: It is no greeting, or of another version of the protocol.
        """
        content = unpacked(frame[1:]) if frame[:1] == HELLO and len(frame) <= SMALL else None
        match content:
            case [int() as version, str() as vflair, *_] if version != VERSION:
                raise ProtocolError(
                    f"The other side speaks version {version} of the protocol (vflair {vflair[:40]}), this one version "
                    f"{VERSION} (vflair {here}). Install the same vflair on both sides."
                )
            case [int() as same, str() as vflair, str() as wire_dtype, int() as most] if most >= 0:
                if wire_dtype not in WIRE_DTYPES:
                    raise ProtocolError(
                        f"The other side (vflair {vflair[:40]}) asks for wire dtype {wire_dtype[:40]!r}; this one (vflair "
                        f"{here}) knows {', '.join(WIRE_DTYPES)}."
                    )
                return cls(vflair[:40], check_wire_dtype(wire_dtype), same, most)
            case _:
                raise ProtocolError(
                    "A stream must begin with a greeting: the other side speaks something else."
                )


def pieces(chunks: Iterable[bytes | memoryview], size: int = PIECE) -> Iterator[bytes]:
    """Write what the codec gives as frames, all but the last with `size` bytes of it."""
    waiting: list[bytes | memoryview] = []
    room = size
    for chunk in chunks:
        rest = memoryview(chunk)
        while rest:
            if not room:
                yield b"".join((MORE, *waiting))
                waiting, room = [], size
            part, rest = rest[:room], rest[room:]
            waiting.append(part)
            room -= len(part)
    yield b"".join((LAST, *waiting))


def content(frames: Iterable[bytes], size: int = PIECE) -> Iterator[memoryview]:
    """Read the pieces of one message.

    Raises:
        VflairError: An error came in its place: the one that the other side names.
        ProtocolError: A frame has no place here, or is shorter or longer than pieces are.
    """
    for frame in frames:
        kind, part = frame[:1], memoryview(frame)[1:]
        if kind == ERROR:
            raise read_error(frame)
        fits = len(part) == size if kind == MORE else kind == LAST and len(part) <= size
        if not fits:
            raise ProtocolError(
                f"A frame {kind!r} of {len(part)} bytes is no piece of a message: those are of {size} bytes, and the last "
                "of at most as many."
            )
        yield part
        if kind == LAST:
            return
    raise ProtocolError("A stream ended in the middle of a message.")
