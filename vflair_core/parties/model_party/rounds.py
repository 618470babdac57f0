"""The model party's side of a round: run a program, and go back through what it left behind.

`data_party/round.py` is the other side. What lies beyond the modules this party holds, in a chain of model parties,
is passed on (`relay.py`) and comes back as if it had been computed here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from transformers.cache_utils import Cache

from vflair_core.communication.cache_kinds import parts_of
from vflair_core.communication.codec import DTYPES
from vflair_core.communication.message import Crossing, Message, reply
from vflair_core.communication.program import Program
from vflair_core.errors import ProtocolError, shown
from vflair_core.parties.model_party.caps import Caps
from vflair_core.parties.model_party.costs import Costs, Meter
from vflair_core.parties.model_party.held_stage import HeldStage
from vflair_core.parties.model_party.session import End, Graph, Session
from vflair_core.parties.model_party.shared_weights import SharedWeights
from vflair_core.partition.adapter_state import AdapterState, adapters_in


@frozen(eq=False)
class Ground:
    """What the calls of all sessions are made on, and how much of it they take."""

    model: nn.Module
    held: Sequence[HeldStage]
    device: torch.device
    costs: Costs
    sessions: Collection[Session]

    def room_for_caches(self, session: Session, caps: Caps) -> int:
        """Bytes that the caches of one session may have beside those of the others."""
        return caps.cache_bytes - sum(s.caches.nbytes for s in self.sessions if s is not session)

    def meter(self, session: Session, *, grad: bool) -> Meter:
        """What counts a forward of a session.

        Raises:
            ProtocolError: Too many of its forwards wait for their backward.
        """
        caps = session.caps
        if not grad:
            return Meter(self.costs, caps, None)
        if len(session.graphs) >= caps.graphs:
            raise ProtocolError(
                f"{caps.graphs} forwards wait for their backward. Use torch.no_grad() where none comes."
            )
        return Meter(self.costs, caps, caps.graph_bytes - sum(s.graph_bytes for s in self.sessions))


def forward(ground: Ground, session: Session, message: Message) -> Message:
    """Run the program that a message names on the tensors it brings.

    Raises:
        ProtocolError: Program and tensors do not fit, or the session holds too much.
    """
    meta, model, caps = message.meta, ground.model, session.caps
    job = session.job(meta, ground.held)
    _check_leaves(job.program, message)
    grad, training, wants = meta["grad"], meta["training"], meta["wants"]
    numbers = range(len(message.tensors))
    if (
        not isinstance(training, bool)
        or not isinstance(grad, bool)
        or not isinstance(wants, (list, tuple))
        or not all(type(n) is int and n in numbers for n in wants)
        or len(set(wants)) != len(wants)
    ):
        raise ProtocolError(
            "'training' and 'grad' must be true or false and 'wants' must count tensors from 0, each once."
        )
    meter = ground.meter(session, grad=grad)
    leaves = [crossing.tensor.to(ground.device) for crossing in message.tensors]
    wanted = [leaves[index].requires_grad_() for index in wants if grad]
    told = meta.get("adapters")
    adapters = None if told is None else AdapterState.from_wire(told)
    if model.training != training:
        model.train(training)
    room = ground.room_for_caches(session, caps)
    with (
        session.caches.lend(meta.get("cache"), job.layers, room) as cache,
        adapters_in(model, adapters),
        session.drawing(ground.device, own=training and not message.once),
        torch.set_grad_enabled(grad),
        _autocast(meta.get("autocast"), leaves),
    ):
        if cache is not None:
            meter.past = _length(cache, job.layers)
            meter.cache_room = session.caches.left(room)
        counterparts = session.counterparts if meta["counterparts"] else []
        for counterpart in reversed(counterparts):  # what was done last is undone first
            for index, crossing in enumerate(message.tensors):
                if crossing.role == "smashed":
                    weight = next(counterpart.parameters(), leaves[index])
                    sent = counterpart(leaves[index].to(weight.dtype))
                    leaves[index] = sent.to(leaves[index].dtype)
        before = None if job.program.id in session.jobs else _own_state(model)
        outputs = job.run(leaves, cache, message, session.onward, meter)
        if before is not None and (changed := before ^ _own_state(model)):
            raise ProtocolError(
                f"{', '.join(sorted({name for name, _ in changed}))} keep what they computed in themselves, where "
                "the sessions of several data parties would mix. Such a model cannot be held by a model party."
            )
    session.jobs[job.program.id] = job
    live = [out.requires_grad for out in outputs]
    if any(live):
        ends = [End.of(out) for out in outputs]
        session.graphs[message.exchange] = Graph(wanted, ends, training, adapters, meter.graph)
    crossings = tuple(
        Crossing("returned", "returned", out.detach(), let_go=True) for out in outputs
    )
    return reply(message, crossings, {"live": live})


def backward(
    model: nn.Module, shared: SharedWeights, session: Session, message: Message
) -> Message:
    """Go back through the graph of an earlier exchange with the gradients a message brings.

    Raises:
        ProtocolError: There is no such graph, or the gradients do not fit its outputs.
    """
    graph = session.graphs.get(message.exchange)
    if graph is None:
        raise ProtocolError(
            f"Exchange {message.exchange} has no graph to go back through: it was freed by its first "
            "backward (pass retain_graph=True to keep it), ran without gradients, or held up the steps of others for too long."
        )
    keep = message.meta["keep"]
    if not isinstance(keep, bool) or not isinstance(message.meta["accumulate"], bool):
        raise ProtocolError("'keep' and 'accumulate' must be true or false.")
    numbers = message.meta["outputs"]
    known = range(len(graph.ends))
    if (
        not numbers
        or not all(type(number) is int and number in known for number in numbers)
        or len(set(numbers)) != len(numbers)
        or len(numbers) != len(message.tensors)
    ):
        raise ProtocolError(
            f"{shown(numbers)} are not the outputs that {len(message.tensors)} gradients can come for."
        )
    ends, gradients = [], []
    for index, crossing in zip(numbers, message.tensors, strict=True):
        end = graph.ends[index]
        if end.edge is None:
            raise ProtocolError(f"Output {index} has no gradient: nothing before it needs one.")
        if crossing.tensor.shape != end.shape or crossing.tensor.dtype != end.dtype:
            raise ProtocolError(
                f"A gradient of shape {tuple(crossing.tensor.shape)} and {crossing.tensor.dtype} came for an "
                f"output of shape {tuple(end.shape)} and {end.dtype}."
            )
        ends.append(end.edge)
        gradients.append(crossing.tensor.to(end.device))
    try:
        answers = _gradients(model, shared, session, graph, ends, gradients, message.meta)
    except BaseException:
        session.graphs.pop(message.exchange)  # a part of it may be used up,
        if message.meta["accumulate"]:
            shared.spoil(session)  # and a part of the gradients may be there
        raise
    if not keep:
        del session.graphs[message.exchange]
    return reply(message, tuple(Crossing("smashed_grad", "smashed_grad", grad) for grad in answers))


def _gradients(
    model: nn.Module,
    shared: SharedWeights,
    session: Session,
    graph: Graph,
    ends: list[GradientEdge],
    gradients: list[Tensor],
    meta: Mapping[str, Any],
) -> list[Tensor]:
    """Go back through a graph. Weights get their gradients unless it is for `autograd.grad`."""
    keep = meta["keep"]
    model.train(graph.training)  # what is computed again must be computed as it was
    if not meta["accumulate"]:
        if not graph.inputs:
            return []
        with adapters_in(model, graph.adapters):
            gradients_of_inputs = torch.autograd.grad(
                ends, graph.inputs, gradients, retain_graph=keep, materialize_grads=True
            )
        return list(gradients_of_inputs)
    shared.show(session)
    session.largest = None
    with adapters_in(model, graph.adapters):
        torch.autograd.backward(ends, gradients, retain_graph=keep)
    answers = []
    for leaf in graph.inputs:
        answers.append(leaf.grad if leaf.grad is not None else torch.zeros_like(leaf))
        leaf.grad = None
    return answers


def _length(cache: Cache, layers: Sequence[int]) -> int:
    """Positions that the held layers of a cache have."""
    own: list[Any] = parts_of(cache)[0].layers
    lengths = (
        own[n].get_seq_length()
        for n in layers[:1]
        if n < len(own) and hasattr(own[n], "get_seq_length")
    )
    return int(next(lengths, 0))


def _own_state(model: nn.Module) -> set[tuple[str, int]]:
    """Tensors that modules hold although they are neither weights nor buffers."""
    return {
        (f"{name}.{key}", id(value))
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, Tensor)
    }


def _check_leaves(program: Program, message: Message) -> None:
    if len(program.leaves) != len(message.tensors):
        raise ProtocolError(
            f"The program takes {len(program.leaves)} tensors, {len(message.tensors)} came."
        )
    for (name, dtype, rank), crossing in zip(program.leaves, message.tensors, strict=True):
        tensor = crossing.tensor
        if crossing.name != name or tensor.dtype != DTYPES[dtype] or tensor.dim() != rank:
            raise ProtocolError(
                f"The program takes {name!r} as {dtype} of rank {rank}; {crossing.name!r} came as "
                f"{tensor.dtype} of rank {tensor.dim()}."
            )


def _autocast(dtype: Any, leaves: list[Tensor]) -> AbstractContextManager[Any]:
    if dtype is not None and dtype not in ("float16", "bfloat16"):
        raise ProtocolError(f"autocast is to float16 or bfloat16, not {shown(dtype)}.")
    return torch.autocast(leaves[0].device.type, DTYPES[dtype]) if dtype else nullcontext()
