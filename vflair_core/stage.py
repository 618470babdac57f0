"""A stage: what the model party runs for one stack, and what it may be asked for at a time."""

from __future__ import annotations

from collections.abc import Iterable

from attrs import frozen

from vflair_core.errors import PartitionError


@frozen
class Stage:
    """What the model party runs in one exchange.

    Args:
        blocks: Names of the blocks in the order of their calls.
        rest: Names of the modules it holds after them (HT): norm, pooler, head.
        optional: Blocks that the model leaves out of some calls, as those for pictures where there is none. Which
            they are is settled when the cut is made; no message adds one.
        pauses: Those of the last block and `rest` whose output the data party needs besides that of the next one.
    """

    blocks: tuple[str, ...]
    rest: tuple[str, ...] = ()
    optional: frozenset[str] = frozenset()
    pauses: frozenset[str] = frozenset()

    @property
    def names(self) -> tuple[str, ...]:
        """Everything in the order of the calls."""
        return self.blocks + self.rest

    def ends_with(self, called: tuple[str, ...]) -> bool:
        """Whether `called` is the whole stage, the last of `rest` after what went before, or comes to a pause."""
        if not called:
            return False
        if called[-1] in self.pauses and self.allows(called):
            return True
        return called == self.rest[-len(called) :] or self._reached(called) == len(self.names)

    def allows(self, called: tuple[str, ...]) -> bool:
        """Whether `called` may be asked for at once: all blocks and what follows, or a piece of `rest`.

        The data party may need a value between two modules of `rest`, to pick the last token for example.
        """
        reached = self._reached(called)
        if called and reached is not None and called[0] in self.blocks:
            return self.optional.issuperset(self.blocks[reached:])
        starts = [n for n, name in enumerate(self.rest) if called and name == called[0]]
        return any(called == self.rest[n : n + len(called)] for n in starts)

    def goes_on_after(self, called: tuple[str, ...]) -> bool:
        """Whether a block that cannot be left out follows `called`."""
        reached = self._reached(called)
        return bool(called) and reached is not None and not self.allows(called)

    def _reached(self, called: tuple[str, ...]) -> int | None:
        """How many of the names lie behind after `called`; None if it is not their beginning."""
        position = 0
        for name in called:
            while self.names[position : position + 1] != (name,):
                if position >= len(self.names) or self.names[position] not in self.optional:
                    return None
                position += 1
            position += 1
        return position


def stage_of(called: tuple[str, ...], stages: Iterable[Stage]) -> Stage:
    """Return the stage that `called` is a run of.

    Raises:
        PartitionError: There is none: the model needs a value from among the blocks of the model party.
    """
    for stage in stages:
        if stage.allows(called):
            return stage
    raise PartitionError(
        f"The model needs a value after {called[-1] if called else 'nothing'}, and the model party gives none from "
        "among its blocks. Choose a cut after that layer; `verify` says which cuts work."
    )
