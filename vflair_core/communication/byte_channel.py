"""A channel that carries bytes: what a stack of another make needs to bring messages there and replies back."""

from __future__ import annotations

from abc import abstractmethod

from vflair_core.communication import codec
from vflair_core.communication.channel import Channel, Handler
from vflair_core.communication.error_frames import ERROR, error_frame, read_error
from vflair_core.communication.message import Message, to_be_rounded
from vflair_core.communication.wire_dtype import WireDtype, check_wire_dtype
from vflair_core.errors import ProtocolError, VflairError
from vflair_core.events import events


class ByteChannel(Channel):
    """The data party's end. Subclasses say only how one frame is brought to `answer`, and its answer back.

    Args:
        wire_dtype: What hidden states and their gradients are rounded to, as `answer` has it.
        most: Bytes of a reply; a longer one is refused before memory is taken for it.
    """

    def __init__(self, *, wire_dtype: WireDtype = "float32", most: int = codec.MOST) -> None:
        super().__init__()
        self.wire_dtype, self._most = check_wire_dtype(wire_dtype), most

    @abstractmethod
    def carry(self, frame: bytes) -> bytes:
        """Bring `frame` to the model party's `answer`, and return what that gave.

        Raises:
            ChannelError: It is not known what became of it; it may be carried again, and is carried out once.
        """

    def deliver(self, message: Message) -> Message:
        answer = self.carry(codec.encode(message))
        if answer[:1] == ERROR:
            raise read_error(answer)
        if len(answer) > self._most:
            raise ProtocolError(
                f"A reply of {len(answer)} bytes came, and at most {self._most} are taken."
            )
        return codec.read([answer], most=len(answer), wire_dtype=self.wire_dtype)


def answer(
    handle: Handler, frame: bytes, *, wire_dtype: WireDtype = "float32", most: int = codec.MOST
) -> bytes:
    """The model party's end of a `ByteChannel`: answer one frame by another, which may hold an error.

    Args:
        handle: The model party's `handle`, or what asks it after a look at the message.
        frame: As it came.
        wire_dtype: As the data party's end has it; a message that was rounded otherwise is refused.
        most: Bytes of a message; a longer one is refused.
    """
    if len(frame) > most:
        refused = f"A message of {len(frame)} bytes came, and at most {most} are taken."
        return error_frame(ProtocolError(refused))
    try:
        message = codec.read([frame], most=len(frame), wire_dtype=wire_dtype)
        return codec.encode(to_be_rounded(handle(message), wire_dtype))
    except VflairError as error:
        return error_frame(error)
    except Exception:  # noqa: BLE001 - it is logged whole, and told in one sentence
        events(__name__).exception("message_failed")
        return error_frame(
            ProtocolError("The model party failed in carrying out a message; its log says why.")
        )
