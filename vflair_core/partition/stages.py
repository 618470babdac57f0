"""What a cut gives to the model party: one stage for each stack of blocks, in the order of their calls.

A *stack* is a list of blocks that the model calls one after the other; a cut goes through every stack: one
for most models, two (encoder and decoder) for sequence-to-sequence ones. `block_discovery.py` finds them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from attrs import frozen
from torch import nn
from transformers import PreTrainedModel

from vflair_core.errors import PartitionError
from vflair_core.partition.partition import Blocks, units_around
from vflair_core.partition.tracing import Trace, trace

if TYPE_CHECKING:
    from vflair_core.partition.partition import Partition


def stages(model: nn.Module, stacks: Sequence[Blocks], partition: Partition) -> tuple[Stage, ...]:
    """Return the modules that go to the model party, in the order the model calls them.

    Raises:
        PartitionError: The cut leaves the legal range.
    """
    middles = [_middle(stack.called(model), partition) for stack in stacks]
    units = units_around(model, stacks)
    found = _trace(model, stacks, units, partition)
    order = list(dict.fromkeys(found.calls))
    left_out = [frozenset(middle).difference(order) if order else frozenset() for middle in middles]
    if partition.tail:
        return tuple(
            Stage(middle, optional=out) for middle, out in zip(middles, left_out, strict=True)
        )
    roots = _roots(stacks)
    starts = [_start(order, middle) for middle in middles]
    cut = []
    for n, middle in enumerate(middles):
        end = starts[n + 1] if n + 1 < len(middles) else len(order)
        prefix = (roots[n] + ".") if len(stacks) > 1 and n + 1 < len(stacks) else ""
        rest = [
            name for name in order[starts[n] : end] if name in units and name.startswith(prefix)
        ]
        pauses = found.lasting.intersection((*middle[-1:], *rest))
        cut.append(Stage(middle, tuple(rest), left_out[n], frozenset(pauses)))
    return tuple(cut)


def names_in(cut: Sequence[Stage]) -> tuple[str, ...]:
    """Names of the modules that the model party holds, in call order, each once."""
    return tuple(dict.fromkeys(name for stage in cut for name in stage.names))


def _middle(calls: tuple[tuple[str, ...], ...], partition: Partition) -> tuple[str, ...]:
    depth = len(calls)
    if partition.head + partition.tail > depth - 1:
        raise PartitionError(
            f"Cannot give {partition.head} + {partition.tail} of {depth} blocks to the data party. "
            f"head + tail must lie between 0 and {depth - 1}; try Partition(head=1, tail=1)."
        )
    middle = calls[partition.head : depth - partition.tail]
    return tuple(name for block in middle for name in block)


def _start(order: Sequence[str], middle: Sequence[str]) -> int:
    for name in middle:
        if name in order:
            return order.index(name)
    raise PartitionError(
        f"A call with text alone calls none of {middle[0]} … {middle[-1]}. Choose a cut that leaves the model party a "
        "block that it calls."
    )


def _trace(
    model: nn.Module, stacks: Sequence[Blocks], units: Sequence[str], partition: Partition
) -> Trace:
    """What a call with text alone calls, in order; HBT needs it only where blocks of several kinds may be left out."""
    blocks = [block for stack in stacks for block in stack.called(model)]
    kinds = {tuple(type(model.get_submodule(name)) for name in block) for block in blocks}
    if partition.tail and len(kinds) <= len(stacks):
        return Trace()
    names = [*units, *dict.fromkeys(name for block in blocks for name in block)]
    try:
        found = trace(model, names, _inner_models(model, stacks))
    except PartitionError:
        if partition.tail:
            return Trace()  # a model that needs more than text: then no block counts as optional
        raise
    called = any(name in found.calls for block in blocks for name in block)
    return found if called or not partition.tail else Trace()


def _inner_models(model: nn.Module, stacks: Sequence[Blocks]) -> list[str]:
    """Models inside `model` that all stacks lie in, the largest first."""
    path = stacks[0].name.split(".")
    prefixes = [".".join(path[:n]) for n in range(1, len(path))]
    return [
        name
        for name in prefixes
        if all(stack.name.startswith(f"{name}.") for stack in stacks)
        and isinstance(model.get_submodule(name), PreTrainedModel)
    ]


def _roots(stacks: Sequence[Blocks]) -> list[str]:
    """The part of the model that belongs to each stack alone: longest prefix no other stack has."""
    roots = []
    for stack in stacks:
        path = stack.name.split(".")
        others = [other.name + "." for other in stacks if other is not stack]
        prefixes = [".".join(path[: n + 1]) for n in range(len(path))]
        alone = [p for p in prefixes if not any(o.startswith(p + ".") for o in others)]
        roots.append(alone[0])
    return roots


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
        if called[-1] != (self.rest or self.blocks)[-1]:
            return False  # as both runs below end with it
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
        position, names = 0, self.names
        for name in called:
            while names[position : position + 1] != (name,):
                if position >= len(names) or names[position] not in self.optional:
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
