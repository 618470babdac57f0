"""What the model party remembers of one data party.

A request over a cap is refused; nothing that is in use is ever dropped.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from attrs import define, field, frozen
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from transformers.cache_utils import Cache

from vflair_core.communication.execution import Execution
from vflair_core.communication.message import Message
from vflair_core.communication.program import Program
from vflair_core.errors import ProtocolError, SessionLostError, shown
from vflair_core.parties.model_party.cache import HeldCaches, Offer
from vflair_core.parties.model_party.caps import Caps
from vflair_core.parties.model_party.costs import Meter
from vflair_core.parties.model_party.held_stage import HeldStage, matching
from vflair_core.parties.model_party.relay import Relay, Rest, divide_program
from vflair_core.partition.adapter_state import AdapterState
from vflair_core.randomness import random_states, set_random_states

_FORGOTTEN = {"released_graphs": int, "released_programs": str, "released_caches": str}
Header = tuple[tuple[Any, ...], list[Any], Any]


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
    nbytes: int  # that it holds, as estimated
    made: float = field(factory=time.monotonic)  # when, in seconds


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
        self,
        leaves: Sequence[Tensor],
        cache: Cache | None,
        message: Message,
        onward: Relay | None,
        meter: Meter,
    ) -> list[Tensor]:
        """Return the tensors of the answer; `meter` sees each call before it is made."""
        call = partial(self.stage.call, meter=meter) if self.stage else _nothing
        run = Execution(call, leaves, cache, meter.caps.step_bytes)
        if self.rest is None or onward is None:
            return run.run(self.program)
        return onward.cross(message, self.rest, run.gather(self.here, self.rest.sources))


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
    offer: Offer = Offer(0, {})
    step: int = 0
    nonces: Sequence[str | None] = ()  # of the messages that opened it, the last one last
    jobs: dict[str, Job] = field(factory=dict)  # by the program's id
    graphs: dict[int, Graph] = field(factory=dict)
    caches: HeldCaches = field(init=False)
    counterparts: list[nn.Module] = field(factory=list)
    onward: Relay | None = None  # to the next model party of a chain
    trains: bool = False
    gradients: dict[nn.Parameter, Tensor] = field(factory=dict)  # while others are on the weights
    largest: float | None = None  # norm of its gradients; None: not known
    spoiled: bool = False  # a backward broke off, and its gradients were dropped
    deposit: dict[nn.Parameter, Tensor] | None = None  # what it committed to a round under way
    options: StepOptions | None = None  # of the optimizer, for that round
    skipped: bool = False
    committed: float = 0.0  # when it did, in seconds
    heard: float = field(factory=time.monotonic)  # when its last message came, in seconds
    _states: Sequence[Tensor] | None = None  # of its random streams
    _first_states: Sequence[Tensor] | None = None  # when its step began
    seq: int | None = None  # of the message that was answered last
    _last: Header | None = (
        None  # the message itself, without its tensors' values, while its reply is kept
    )
    _reply: Message | None = None

    def __attrs_post_init__(self) -> None:
        self.caches = HeldCaches(self.caps, self.offer)

    # -- exactly once -----------------------------------------------------------------------------------

    def said_before(self, message: Message) -> Message | None:
        """Return the reply that was given to `message` when it came for the first time; None if it is the next one.

        Raises:
            SessionLostError: It is neither the last one that was answered nor the one after it.
        """
        if message.once or message.kind == "close":  # which always works
            return None
        if message.seq == self.seq and self._last is not None and _header(message) == self._last:
            return self._reply
        if message.kind == "open":
            nonce = message.meta.get("nonce")
            fresh = nonce is None or nonce not in self.nonces
        else:
            fresh = self.seq is None or message.seq == self.seq + 1
        if fresh:
            return None
        raise SessionLostError(
            f"Message {message.seq} of this session came after message {self.seq}. Each is answered once, in their order; "
            "only the last one may be sent again, as it was. If its reply was lost, the parties may be at different points: go "
            "on from a checkpoint, or open the session anew."
        )

    @property
    def kept(self) -> int:
        """Bytes of the answer that is kept."""
        return self._reply.nbytes if self._reply is not None else 0

    def answered(self, message: Message, answer: Message, room: int) -> Message:
        """Keep the answer, in case it is lost on the way; not if it has more bytes than `room`."""
        self.seq = message.seq
        keep = not message.once and answer.nbytes <= room
        self._last = _header(message) if keep else None
        self._reply = answer if keep else None
        return answer

    # -- its random streams -----------------------------------------------------------------------------

    @contextmanager
    def drawing(self, device: torch.device, *, own: bool) -> Iterator[None]:
        """While this lasts, what is drawn comes of a stream that is this session's alone.

        It begins with the seed of the process (`torch.manual_seed`). Where both parties share a process they share its
        stream, as the layers of the unsplit model do.
        """
        if not own:
            yield
            return
        before = random_states(device)
        try:
            if self._states is None:
                torch.manual_seed(torch.initial_seed())
            else:
                set_random_states(self._states)
            yield
            self._states = random_states(device)
        finally:
            set_random_states(before)

    def begin_step(self, *, anew: bool = False) -> None:
        """What is drawn from here on is of a new step, or of the same one `anew`."""
        if anew:
            self._states = self._first_states
        else:
            self._first_states = self._states

    # -- what it holds ----------------------------------------------------------------------------------

    @property
    def graph_bytes(self) -> int:
        """Bytes that its graphs hold, as estimated."""
        return sum(graph.nbytes for graph in self.graphs.values())

    @contextmanager
    def forgetting(self, meta: Any, room: int) -> Iterator[None]:
        """Copy the caches that the data party copied, and drop what it no longer uses; if what is done meanwhile fails, neither.

        Raises:
            ProtocolError: It was told in another form, or the copies are more than may be kept in `room` bytes.
        """
        told = {key: _listed(meta, key, kind) for key, kind in _FORGOTTEN.items()}
        gone = told["released_caches"]
        copies = self.caches.copy(meta.get("copied_caches", ()), gone, room)
        jobs, graphs = dict(self.jobs), dict(self.graphs)
        caches = self.caches.set_aside(gone)
        for number in told["released_graphs"]:
            self.graphs.pop(number, None)
        for program in told["released_programs"]:
            self.jobs.pop(program, None)
        try:
            yield
        except BaseException:
            self.jobs, self.graphs = jobs, graphs
            self.caches.put_back(caches)
            for key in copies:
                self.caches.drop(key)
            raise
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
            raise ProtocolError(f"Program {shown(meta['id'])} was not registered in this session.")
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


def _listed(meta: Any, key: str, kind: type) -> list[Any]:
    told = meta.get(key, ())
    if not isinstance(told, (list, tuple)) or not all(type(one) is kind for one in told):
        raise ProtocolError(f"{key!r} must be a list of {kind.__name__}, not {shown(told)}.")
    return list(told)


def _header(message: Message) -> Header:
    """A message without the values of its tensors."""
    tensors = [(c.name, c.role, c.tensor.dtype, tuple(c.tensor.shape)) for c in message.tensors]
    numbers = (message.kind, message.step, message.exchange, message.phase)
    return numbers, tensors, _plain(message.meta)


def _plain(value: Any) -> Any:
    """The same value with lists for tuples, as it comes over a wire."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
