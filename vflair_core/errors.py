"""The errors vflair raises: each says what was asked, what is possible and what to do."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable

LONGEST = 2000  # characters of the text of an error


class VflairError(Exception):
    """Base of every error vflair raises on purpose.

    No text of one is longer than `LONGEST`: much of what errors speak of came from elsewhere, and they cross to the other
    party. Of a longer one the beginning and the end are kept.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(_cut(arg) if isinstance(arg, str) else arg for arg in args))

    def __str__(self) -> str:
        return _cut(super().__str__())


def _cut(text: str) -> str:
    end = LONGEST // 4
    return text if len(text) <= LONGEST else f"{text[: LONGEST - end - 3]} … {text[-end:]}"


class PartitionError(VflairError):
    """A model cannot be cut as asked."""


class LeakError(PartitionError):
    """Something that must stay with the data party was about to cross.

    `tensor` is its name, where it is one tensor that `Partition(disclose=...)` can let through.
    """

    def __init__(self, message: str, tensor: str | None = None) -> None:
        super().__init__(message)
        self.tensor = tensor


class ProtocolError(VflairError):
    """A message breaks the rules of the exchange between the parties."""


class SessionLostError(ProtocolError):
    """The model party does not know the session any more, or as another one: it was started anew, or a reply was lost for good."""


class BusyError(ProtocolError):
    """The model party would do it, but other data parties must be done first; nothing has changed. Ask again soon."""


class ChannelError(VflairError):
    """A message could not be brought to the model party, or its reply did not come back in time."""


class SecondDerivativeError(VflairError, RuntimeError):
    """Something was to be differentiated twice through the cut."""


class CheckpointError(VflairError):
    """A checkpoint, whole or one party's part, cannot be read, written or joined."""


class DefenseError(VflairError):
    """A defense cannot do what it was asked to do here."""


class AttackError(VflairError):
    """An attack cannot be launched or returned something that cannot be graded."""


class TaskError(VflairError):
    """A task or its data cannot be used as asked."""


class ExperimentError(VflairError):
    """An experiment file asks for something that does not exist or does not fit."""


class PluginError(VflairError):
    """A plugin cannot be loaded or offers something that clashes."""


FEW = 8  # names that a message lists all of
NEAREST = 5  # names that it lists of more


def did_you_mean(asked: str, possible: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` when something close to `asked` exists, else ``""``."""
    names = {name.lower(): name for name in map(str, possible)}
    close = difflib.get_close_matches(asked.lower(), names, n=1)
    return f" Did you mean {names[close[0]]!r}?" if close else ""


def alternatives(
    asked: str, possible: Iterable[str], *, label: str = "Possible", none: str = "none"
) -> str:
    """Return what could have been asked instead, as ``" Did you mean 'x'? Possible: x, y."``.

    Few names are all listed. Of many the nearest are, with how many there are. `label` stands before them, `none` where
    there are none.
    """
    names = list(dict.fromkeys(map(str, possible)))
    hint = did_you_mean(asked, names)
    if len(names) <= FEW:
        return f"{hint} {label}: {', '.join(names) or none}."
    nearest = sorted(names, key=lambda name: -_likeness(asked, name))[:NEAREST]
    return f"{hint} {label}: {', '.join(nearest)} (the nearest of {len(names)})."


def _likeness(asked: str, name: str) -> float:
    return difflib.SequenceMatcher(None, asked.lower(), name.lower()).ratio()


class _Brief(reprlib.Repr):
    """The beginning of a value, whatever its size; of bytes only how many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, 60, 60

    def repr_bytes(self, value: bytes, _level: int) -> str:
        return f"{len(value)} bytes"


_BRIEF = _Brief()


def shown(value: object) -> str:
    """A value that came from elsewhere, as an error shows it: at most 200 characters of its beginning."""
    text = _BRIEF.repr(value)
    return text if len(text) <= 200 else f"{text[:199]}…"
