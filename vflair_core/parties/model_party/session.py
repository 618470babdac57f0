"""What the model party remembers of one data party.

A request over a cap is refused; nothing that is in use is ever dropped.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from attrs import define, field, frozen
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from transformers.cache_utils import Cache

from vflair_core.communication.execution import Execution
from vflair_core.communication.message import Message
from vflair_core.communication.program import Program
from vflair_core.errors import ProtocolError
from vflair_core.parties.model_party.cache import HeldCaches
from vflair_core.parties.model_party.caps import Caps
from vflair_core.parties.model_party.held_stage import HeldStage, matching
from vflair_core.parties.model_party.relay import Relay, Rest, divide_program
from vflair_core.partition.adapter_state import AdapterState


@frozen(eq=False)
class End:
    """Where a gradient enters the graph: all that is kept of an output, whose values are the data party's now."""

    edge: GradientEdge | None  # None: no gradient goes back from here
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, output: Tensor) -> End:
        edge = get_gradient_edge(output) if output.requires_grad else None
        return cls(edge, output.shape, output.dtype, output.device)


@define(eq=False)
class Graph:
    """A forward whose backward may still come."""

    inputs: list[Tensor]
    ends: list[End]
    training: bool
    adapters: AdapterState | None  # that were on


@frozen(eq=False)
class Job:
    """A program that was checked, and who runs which of its steps."""

    program: Program
    here: Program | None  # None: none of it
    rest: Rest | None  # what the next party of a chain runs
    stage: HeldStage | None

    @property
    def layers(self) -> Sequence[int]:
        """Numbers of the cache layers that the steps here fill."""
        return self.stage.layers if self.stage else ()

    def run(
        self, leaves: Sequence[Tensor], cache: Cache | None, message: Message, onward: Relay | None
    ) -> list[Tensor]:
        """Return the tensors of the answer."""
        run = Execution(self.stage.call if self.stage else _nothing, leaves, cache)
        if self.rest is None or onward is None:
            return run.run(self.program)
        return onward.cross(
            message, self.rest, run.gather(self.here.steps if self.here else (), self.rest.sources)
        )


def _nothing(name: str, *_: Any) -> Any:
    raise ProtocolError(f"{name} is not held here.")


@frozen
class StepOptions:
    """What an optimizer step is taken with: a learning rate, or the options of each group of weights."""

    rate: float
    groups: Sequence[Mapping[str, Any]] | None = None

    def __str__(self) -> str:
        return f"learning rate {self.rate}" if self.groups is None else f"options {self.groups}"


@define(eq=False)
class Session:
    """What the model party remembers of one data party."""

    caps: Caps
    jobs: dict[str, Job] = field(factory=dict)  # by the program's id
    graphs: dict[int, Graph] = field(factory=dict)
    caches: HeldCaches = field(init=False)
    counterparts: list[nn.Module] = field(factory=list)
    onward: Relay | None = None  # to the next model party of a chain
    trains: bool = False
    step: int = 0
    gradients: dict[nn.Parameter, Tensor] = field(factory=dict)  # while others are on the weights
    deposit: dict[nn.Parameter, Tensor] | None = None  # what it committed to a round under way
    options: StepOptions | None = None  # of the optimizer, for that round
    skipped: bool = False
    heard: float = field(factory=time.monotonic)  # when its last message came, in seconds

    def __attrs_post_init__(self) -> None:
        self.caches = HeldCaches(self.caps)

    def forget(self, meta: Any) -> None:
        """Drop what the data party no longer uses, and copy the caches it copied."""
        for number in meta.get("released_graphs", ()):
            self.graphs.pop(number, None)
        for program in meta.get("released_programs", ()):
            self.jobs.pop(program, None)
        for old, new in meta.get("copied_caches", ()):
            self.caches.copy(old, new)
        for key in meta.get("released_caches", ()):
            self.caches.drop(key)
        if self.onward is not None:
            self.onward.pass_on_released(meta)

    def job(self, meta: Any, held: Sequence[HeldStage]) -> Job:
        """Return the program that a forward names, checked when it comes for the first time."""
        if "program" in meta:
            program = Program.from_wire(meta["program"])
            job = self._checked(program, held)
            if len(self.jobs) >= self.caps.programs:
                raise ProtocolError(f"A session may register {self.caps.programs} programs.")
            if program.id == meta["id"]:
                return job
        if meta["id"] not in self.jobs:
            raise ProtocolError(f"Program {meta['id']} was not registered in this session.")
        return self.jobs[meta["id"]]

    def _checked(self, program: Program, held: Sequence[HeldStage]) -> Job:
        here: Program | None = program
        rest = None
        if self.onward is not None:
            names = {name for one in held for name in one.stage.names}
            here, rest = divide_program(program, names.__contains__)
        stage = matching(here, held) if here is not None else None
        if stage is not None and here is not None:
            stage.check(here)
        return Job(program, here, rest, stage)
