"""The slices of a model that can be chosen for training: which part of it is in which."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from attrs import frozen
from torch import nn

from vflair_core.errors import ExperimentError, alternatives, did_you_mean
from vflair_core.partition.partition import Blocks, units_around
from vflair_core.partition.stages import Stage

if TYPE_CHECKING:
    from vflair_core.partition.partition import Partition

SLICES = ("data_party", "model_party", "head", "body", "tail", "embeddings", "task_head")


@frozen
class Slices:
    """What each unit of a whole model (a block, or a module around the blocks) belongs to.

    Every unit is in ``data_party`` or ``model_party``, by who holds it. ``head`` is the embeddings and the first
    blocks; ``tail`` the last blocks and everything behind them; ``body`` what lies between, which HT
    calls tail. ``embeddings`` are the modules before the blocks that embed; ``task_head`` is all else outside
    the blocks (final norm, pooler, classifier, output layer); ``blocks.3`` is the block of that number in every
    stack. A block that is called on both sides (ALBERT's share their weights) is in the slices of both.
    """

    units: Mapping[str, frozenset[str]]

    @classmethod
    def find(
        cls,
        model: nn.Module,
        stacks: Sequence[Blocks],
        stages: Sequence[Stage],
        partition: Partition,
    ) -> Slices:
        """Sort the units of a whole model; `stages` are what the cut takes of its stacks."""
        middle = "body" if partition.tail else "tail"
        found: dict[str, set[str]] = {}
        for stack in stacks:
            calls = stack.called(model)
            for number, block in enumerate(calls):
                if number < partition.head:
                    names = {"data_party", "head"}
                elif number < len(calls) - partition.tail:
                    names = {"model_party", middle}
                else:
                    names = {"data_party", "tail"}
                for unit in block:
                    found.setdefault(unit, set()).update(names, {f"blocks.{number}"})
        absent = {name for stage in stages for name in stage.rest}
        for unit in units_around(model, stacks):
            embeds = any(isinstance(m, nn.Embedding) for m in model.get_submodule(unit).modules())
            found[unit] = {"embeddings", "head"} if embeds else {"task_head", "tail"}
            found[unit].add("model_party" if unit in absent else "data_party")
        return cls({unit: frozenset(names) for unit, names in found.items()})

    def of(self, name: str) -> frozenset[str]:
        """Return the slices of a module or weight by its name, also of one inside an adapter."""
        parts = name.split(".")
        for end in range(len(parts), 0, -1):
            if found := self.units.get(".".join(parts[:end])):
                return found
        return frozenset(
            {"data_party"}
        )  # a weight that lies in no module of its own, as `cls_token`

    def check(self, chosen: Iterable[str]) -> None:
        """See that this model has all slices of `chosen`.

        Raises:
            ExperimentError: It lacks one.
        """
        possible = sorted(frozenset().union(*self.units.values()), key=_by_number)
        for name in chosen:
            if name not in possible:
                blocks = [each for each in possible if "." in each]
                shown = [each for each in possible if "." not in each]
                shown += [f"{blocks[0]} … {blocks[-1]}"] if blocks else []
                raise ExperimentError(
                    f"This model, cut this way, has no slice {name!r}.{did_you_mean(name, possible)} It has "
                    f"{', '.join(shown)}."
                )


def check_names(chosen: Iterable[str]) -> None:
    """See that each of `chosen` could be a slice of some model.

    Raises:
        ExperimentError: One could not.
    """
    for name in chosen:
        if name not in SLICES and not re.fullmatch(r"blocks\.\d+", name):
            raise ExperimentError(
                f"There is no slice {name!r}.{alternatives(name, (*SLICES, 'blocks.0', 'blocks.1, …'))}"
            )


def _by_number(name: str) -> tuple[bool, int, str]:
    word, _, number = name.partition(".")
    return bool(number), int(number or 0), word
