"""A data party that is asked for its next request, where it is the other side that calls.

The data party's code calls the model party, in the middle of a forward and of a backward, and waits. Many stacks know
only the other direction: a server calls, a client returns. Here the data party's code runs in a thread of its own, and
what it sends is handed over, one frame at a time, to whoever asks for it.
"""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Generic, Self, TypeVar

from vflair_core.communication.byte_channel import ByteChannel
from vflair_core.communication.channel import Channel
from vflair_core.communication.error_frames import error_frame
from vflair_core.communication.wire_dtype import WireDtype
from vflair_core.errors import ChannelError, ProtocolError, VflairError

T = TypeVar("T")


class Stepwise(Generic[T]):
    """Runs `work` up to its next request, as often as it is asked for one; it begins when it is first asked.

    ``next()`` gives the request as a frame for the model party's `answer`, ``reply(frame)`` takes what that gave, until
    ``next()`` gives None: then the work is done, and `result` is what it returned. What the work raises comes out of
    ``next()``. Leaving a ``with`` block ends it wherever it is.

    Args:
        work: Gets the channel to the model party, and uses it as any other.
        wire_dtype: What hidden states and their gradients are rounded to, as the model party's `answer` has it.
        timeout: Seconds that the work waits for a reply, before it meets a `ChannelError`; None waits for ever.
    """

    def __init__(
        self,
        work: Callable[[Channel], T],
        *,
        wire_dtype: WireDtype = "float32",
        timeout: float | None = None,
    ) -> None:
        if timeout is not None and not timeout > 0:
            raise ChannelError(f"timeout must be a number of seconds > 0, not {timeout!r}.")
        self._turn = _Turn(timeout)
        self._work, self._channel = work, _Handover(self._turn, wire_dtype)
        context = contextvars.copy_context()
        # A daemon: work that does not end must not keep the process.
        self._thread = threading.Thread(
            target=context.run, args=(self._run,), name="vflair data party", daemon=True
        )
        self._result: T | None = None
        self._error: BaseException | None = None

    def next(self, timeout: float | None = None) -> bytes | None:
        """Wait for the next request, and return its frame; None when the work is done.

        Asked again before `reply`, it gives the same frame again: so a frame that was lost may be asked for again.

        Args:
            timeout: Seconds to wait while the data party computes; 0 only looks. None waits for ever.

        Raises:
            TimeoutError: The data party still computes. Ask again.
            ChannelError: This was closed.
            BaseException: What the work raised.
        """
        if self._turn.begin():
            self._thread.start()
        frame = self._turn.awaited(timeout)
        if frame is not None:
            return frame
        if self._turn.closed:
            raise ChannelError("This was closed: no other request comes. Make another one.")
        self._thread.join()
        if self._error is not None:
            raise self._error
        return None

    def reply(self, frame: bytes) -> None:
        """Hand over the answer to the request that `next` gave; the work goes on.

        Raises:
            ProtocolError: No request waits for one.
            TypeError: It is no bytes.
        """
        if not isinstance(frame, bytes | bytearray | memoryview):
            raise TypeError(f"A reply is a frame of bytes, not {type(frame).__name__}.")
        self._turn.answer(bytes(frame))

    def fail(self, error: VflairError) -> None:
        """Let the request that `next` gave fail, such as by a `ChannelError` where it could not be brought.

        Raises:
            ProtocolError: No request waits for a reply.
        """
        self._turn.answer(error_frame(error))

    @property
    def result(self) -> T:
        """What the work returned.

        Raises:
            ProtocolError: It is not done, or ended in an error.
        """
        if isinstance(self._error, Exception):  # and no end that was asked for
            raise ProtocolError(f"The work ended in an error: {self._error!r}.")
        if not self._turn.ended or self._turn.closed or self._error is not None:
            raise ProtocolError("The work is not done: call next() until it gives None.")
        return self._result  # type: ignore[return-value]  # None only where the work returned it

    def close(self, timeout: float | None = None) -> None:
        """End the work: where it waits for a reply, and at its next request, it meets a `GeneratorExit`.

        The session is not ended at the model party: the model party's `expiry`, or `drop`, is for that.

        Args:
            timeout: Seconds to wait until the work has ended; None waits for ever.

        Raises:
            TimeoutError: It still computes. It ends at its next request.
        """
        self._turn.close()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout)
            if self._thread.is_alive():
                raise TimeoutError(f"The work still computes after {timeout:g} seconds.")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self.close()

    def _run(self) -> None:
        try:
            self._result = self._work(self._channel)
        except BaseException as error:  # noqa: BLE001 - it comes out where the next request is asked for
            self._error = error
        finally:
            self._turn.end()


class _Turn:
    """Whose turn it is: a request that waits for its reply, or the data party that computes."""

    def __init__(self, timeout: float | None) -> None:
        self._timeout = timeout
        self._changed = threading.Condition()
        self._one = threading.Lock()  # threads of the work take turns; backward has one of its own
        self._request: bytes | None = None
        self._reply: bytes | None = None
        self._begun = self.ended = self.closed = False

    def begin(self) -> bool:
        """Whether the work is to begin now."""
        with self._changed:
            begins = not self._begun and not self.closed
            self._begun = self._begun or begins
            return begins

    def ask(self, frame: bytes) -> bytes:
        """Hand over a request and wait for its reply: the work's side."""
        with self._one, self._changed:
            self._check_open()
            self._request, self._reply = frame, None
            self._changed.notify_all()
            came = self._changed.wait_for(
                lambda: self._reply is not None or self.closed, self._timeout
            )
            self._request, reply = None, self._reply
            if reply is not None:
                return reply
            self._check_open()
            assert not came
            raise ChannelError(
                f"No reply came within {self._timeout:g} seconds (timeout): whoever asks for requests has not called "
                "reply(...)."
            )

    def awaited(self, timeout: float | None) -> bytes | None:
        """Wait for a request: the caller's side. None where no other comes."""
        until = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            there = self._changed.wait_for(
                lambda: self.closed or self.ended or self._waits,
                None if until is None else max(0.0, until - time.monotonic()),
            )
            if not there:
                raise TimeoutError("The data party still computes: ask again.")
            return self._request if self._waits and not self.closed else None

    def answer(self, reply: bytes) -> None:
        """Hand over the reply to the request that waits."""
        with self._changed:
            if not self._waits:
                raise ProtocolError(
                    "No request waits for a reply: call next() first, and reply once to what it gave. A request whose "
                    "time was up waits no more."
                )
            self._reply = reply
            self._changed.notify_all()

    def end(self) -> None:
        """No other request comes."""
        with self._changed:
            self.ended = True
            self._changed.notify_all()

    def close(self) -> None:
        """Let the work end, wherever it waits, and at its next request."""
        with self._changed:
            self.closed = self.closed or not self.ended
            self._changed.notify_all()

    @property
    def _waits(self) -> bool:
        return self._request is not None and self._reply is None

    def _check_open(self) -> None:
        if self.closed:
            # No error of vflair, which work that is patient would meet by asking again.
            raise GeneratorExit("Whoever asked for requests does so no more.")


class _Handover(ByteChannel):
    """The channel that the work gets."""

    def __init__(self, turn: _Turn, wire_dtype: WireDtype) -> None:
        super().__init__(wire_dtype=wire_dtype)
        self._turn = turn

    def carry(self, frame: bytes) -> bytes:
        return self._turn.ask(frame)
