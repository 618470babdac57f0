"""The model party's side of a round: run a program, and go back through what it left behind.

`data_party/round.py` is the other side. What lies beyond the modules this party holds, in a chain of model parties,
is passed on (`relay.py`) and comes back as if it had been computed here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from vflair_core.communication.codec import DTYPES
from vflair_core.communication.message import Crossing, Message, reply
from vflair_core.communication.program import Program
from vflair_core.errors import ProtocolError
from vflair_core.parties.model_party.held_stage import HeldStage
from vflair_core.parties.model_party.session import End, Graph, Session
from vflair_core.parties.model_party.shared_weights import SharedWeights
from vflair_core.partition.adapter_state import AdapterState, adapters_in


def forward(
    model: nn.Module,
    stages: Sequence[HeldStage],
    device: torch.device,
    session: Session,
    message: Message,
) -> Message:
    """Run the program that a message names on the tensors it brings.

    Raises:
        ProtocolError: Program and tensors do not fit, or the session holds too much.
    """
    meta = message.meta
    job = session.job(meta, stages)
    _check_leaves(job.program, message)
    leaves = [crossing.tensor.to(device) for crossing in message.tensors]
    grad = bool(meta["grad"])
    if not isinstance(meta["training"], bool) or not all(index >= 0 for index in meta["wants"]):
        raise ProtocolError(
            "'training' must be true or false and 'wants' must count tensors from 0."
        )
    wanted = [leaves[index].requires_grad_() for index in meta["wants"]] if grad else []
    if grad and len(session.graphs) >= session.caps.graphs:
        raise ProtocolError(
            f"{session.caps.graphs} forwards wait for their backward. Use torch.no_grad() where none comes."
        )
    told = meta.get("adapters")
    adapters = None if told is None else AdapterState.from_wire(told)
    if model.training != meta["training"]:
        model.train(meta["training"])
    with (
        session.caches.lend(meta.get("cache"), job.layers) as cache,
        adapters_in(model, adapters),
        torch.set_grad_enabled(grad),
        _autocast(meta.get("autocast"), leaves),
    ):
        counterparts = session.counterparts if meta["counterparts"] else []
        for counterpart in reversed(counterparts):  # what was done last is undone first
            for index, crossing in enumerate(message.tensors):
                if crossing.role == "smashed":
                    leaves[index] = counterpart(leaves[index])
        before = None if job.program.id in session.jobs else _own_state(model)
        outputs = job.run(leaves, cache, message, session.onward)
        if before is not None and (changed := before ^ _own_state(model)):
            raise ProtocolError(
                f"{', '.join(sorted({name for name, _ in changed}))} keep what they computed in themselves, where "
                "the sessions of several data parties would mix. Such a model cannot be held by a model party."
            )
    session.jobs[job.program.id] = job
    live = [out.requires_grad for out in outputs]
    if any(live):
        ends = [End.of(out) for out in outputs]
        session.graphs[message.exchange] = Graph(wanted, ends, meta["training"], adapters)
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
            "backward (pass retain_graph=True to keep it) or ran without gradients."
        )
    keep = message.meta["keep"]
    if not isinstance(keep, bool) or not isinstance(message.meta["accumulate"], bool):
        raise ProtocolError("'keep' and 'accumulate' must be true or false.")
    numbers = message.meta["outputs"]
    if not numbers or len(set(numbers)) != len(numbers) or min(numbers) < 0:
        raise ProtocolError(f"{numbers} are not outputs that a gradient can come for.")
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
    answers = _gradients(model, shared, session, graph, ends, gradients, message.meta)
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
    with adapters_in(model, graph.adapters):
        torch.autograd.backward(ends, gradients, retain_graph=keep)
    answers = []
    for leaf in graph.inputs:
        answers.append(leaf.grad if leaf.grad is not None else torch.zeros_like(leaf))
        leaf.grad = None
    return answers


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


def _autocast(dtype: str | None, leaves: list[Tensor]) -> AbstractContextManager[Any]:
    return torch.autocast(leaves[0].device.type, DTYPES[dtype]) if dtype else nullcontext()
