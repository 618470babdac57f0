"""The errors vflair raises: each says what was asked, what is possible and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VflairError(Exception):
    """Base of every error vflair raises on purpose."""


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
