"""The stacks of a model's blocks, and which modules a cut gives to the model party.

A *stack* is a list of blocks that the model calls one after the other; a cut goes through every stack: one
for most models, two (encoder and decoder) for sequence-to-sequence ones. `locating.py` finds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from attrs import frozen
from torch import nn
from transformers import PreTrainedModel

from vflair_core.errors import PartitionError
from vflair_core.partition.tracing import Trace, trace
from vflair_core.stage import Stage

if TYPE_CHECKING:
    from vflair_core.parties.split import Partition


@frozen
class Blocks:
    """A stack of blocks.

    Args:
        name: Dotted name of the list, e.g. ``"transformer.h"``.
        calls: Names of the blocks in the order of their calls; a shared block is named once for each call.
            A block whose modules lie in several lists is a tuple of their names, in the order of their calls.
            Left out, each entry of the list is called once, in order.
    """

    name: str
    calls: tuple[str | tuple[str, ...], ...] = ()

    def called(self, model: nn.Module) -> tuple[tuple[str, ...], ...]:
        """Names of the modules of each block, in the order in which `model` calls them; most blocks are one."""
        depth = len(model.get_submodule(self.name))  # type: ignore[arg-type]
        calls = self.calls or tuple(f"{self.name}.{n}" for n in range(depth))
        return tuple((call,) if isinstance(call, str) else call for call in calls)

    def lists(self) -> frozenset[str]:
        """Names of the lists that the blocks lie in."""
        flat = [
            name for call in self.calls for name in ((call,) if isinstance(call, str) else call)
        ]
        return frozenset([self.name, *(name.rpartition(".")[0] for name in flat)])


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
        own = (roots[n] + ".") if len(stacks) > 1 and n + 1 < len(stacks) else ""
        rest = [name for name in order[starts[n] : end] if name in units and name.startswith(own)]
        pauses = found.lasting.intersection((*middle[-1:], *rest))
        cut.append(Stage(middle, tuple(rest), left_out[n], frozenset(pauses)))
    return tuple(cut)


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


def units_around(model: nn.Module, stacks: Sequence[Blocks]) -> list[str]:
    """Largest modules with weights that are not around the blocks."""
    units = []
    lists = frozenset().union(*(stack.lists() for stack in stacks))

    def walk(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            full = f"{prefix}{name}"
            if full in lists:
                continue
            if any(name.startswith(full + ".") for name in lists):
                walk(child, full + ".")
            elif any(True for _ in child.parameters()):
                units.append(full)

    walk(model, "")
    return units
