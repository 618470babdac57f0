"""The cut as a record: how many blocks the data party keeps at either end, and the stacks it goes through."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from attrs import asdict, field, frozen
from torch import nn

from vflair_core.errors import PartitionError

SCORED = "scored_positions"  # the tensor that tells which positions enter the loss


def _not_negative(_instance: object, attribute: Any, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise PartitionError(
            f"{attribute.name} must be a whole number of blocks >= 0, not {value!r}; "
            "try Partition(head=2, tail=2)."
        )


def _names_of_tensors(_instance: object, _attribute: Any, names: tuple[str, ...]) -> None:
    if SCORED in names:
        raise PartitionError(
            f"{SCORED!r} is no tensor that a model sends. To get the logits of scored positions only, say "
            "Partition(head, 0, only_scored=True)."
        )


@frozen
class Partition:
    """How many blocks the data party keeps at either end.

    Args:
        head: Blocks after the embeddings.
        tail: Blocks before the final norm; 0 gives norm and task head to the model party (HT).
        disclose: Names of tensors that depend on the text and may cross all the same, although they are
            not hidden states. Everything of that sort is refused unless named here, and the name is recorded.
        only_scored: In HT, let a training step return the logits of those positions only that some row of the batch
            scores. Which these are crosses in the clear, as the tensor ``scored_positions``, and is recorded.
    """

    head: int = field(default=2, validator=_not_negative)
    tail: int = field(default=2, validator=_not_negative)
    disclose: tuple[str, ...] = field(default=(), converter=tuple, validator=_names_of_tensors)
    only_scored: bool = field(default=False, kw_only=True)

    def facts(self) -> dict[str, Any]:
        """The cut as a result tells it; what is off is left out."""
        return asdict(self, filter=lambda _, value: value is not False)

    @property
    def disclosing(self) -> tuple[str, ...]:
        """Names of all tensors that may cross although they depend on the text and are no hidden states."""
        return (*self.disclose, SCORED) if self.only_scored else self.disclose

    @property
    def kind(self) -> Literal["HT", "HBT"]:
        """HT when the model party holds the end of the model, HBT when it holds only the middle."""
        return "HBT" if self.tail else "HT"


def called_here(
    model: nn.Module, stacks: Sequence[Blocks], partition: Partition
) -> dict[str, tuple[bool, ...]]:
    """Blocks that both parties need (ALBERT's share weights): for each call, whether it is made here."""
    here: dict[str, list[bool]] = {}
    for stack in stacks:
        calls = stack.called(model)
        for number, block in enumerate(calls):
            middle = partition.head <= number < len(calls) - partition.tail
            for name in block:
                here.setdefault(name, []).append(not middle)
    return {name: tuple(made) for name, made in here.items() if len(set(made)) > 1}


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
