"""The model party: holds modules, runs the one chain of calls it was built for, and answers messages."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from vflair_core import counterparts
from vflair_core.chain import Chain
from vflair_core.codec import DTYPES
from vflair_core.errors import PartitionError, ProtocolError
from vflair_core.fingerprint import differences
from vflair_core.locks import Lock
from vflair_core.message import Crossing, Message
from vflair_core.program import Execution, Program
from vflair_core.saving import load_session, save_model_party, save_session
from vflair_core.session import Caps, End, Graph, Session
from vflair_core.shared import Rule, SharedWeights, norms_of
from vflair_core.slices import Slices
from vflair_core.stage import Stage

_WRONG = (AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)


class ModelParty:
    """Holds modules of `model`, under the names the whole model gives them.

    It runs only programs that call one of the `stages` (names in call order) from its first module to its
    last, each output feeding the next call. Live graphs, caches and programs are capped per session; a
    request over a cap is refused, nothing is dropped.

    Several data parties may have a session each. `sharing` says when the weights they share take a step.
    Set `checkpoints` to a folder to let data parties have their runs saved there and go on from it.
    """

    slices: Slices = Slices({})

    def __init__(self, model: nn.Module, stages: Sequence[Stage], fingerprint: str) -> None:
        self.model = model
        self.chains = [Chain(model, names) for names in stages]
        self.fingerprint = fingerprint
        self.caps = Caps()
        self.sessions: dict[str, Session] = {}
        self.shared = SharedWeights(model, self.sessions)
        self._lock = Lock()
        self.steps: dict[str, int] = {}  # taken on these weights, by session
        self.checkpoints: str | Path | None = None

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Weights by the names they have in the whole model."""
        return self.model.named_parameters()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Weights, in the order of the whole model."""
        return self.model.parameters()

    @property
    def sharing(self) -> Rule:
        """``"turns"``: each commit is a step; ``"mean"``: one step when all training sessions have committed."""
        return self.shared.rule

    @sharing.setter
    def sharing(self, rule: Rule) -> None:
        self.shared.rule = rule

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """Compute activations again in the backward instead of keeping them, as transformers' models do."""
        options = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        self._checkpoint(functools.partial(checkpoint, **options))

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        self._checkpoint(None)

    def _checkpoint(self, function: Callable[..., Any] | None) -> None:
        blocks: list[Any] = [
            m for m in self.model.modules() if isinstance(m, GradientCheckpointingLayer)
        ]
        if not blocks:
            raise PartitionError(
                "No held module can be checkpointed: none is a block of transformers."
            )
        for block in blocks:
            block._gradient_checkpointing_func = function
            block.gradient_checkpointing = function is not None

    @property
    def device(self) -> torch.device:
        """Where messages are brought: the device of the first weight."""
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    def save(self, folder: str | Path) -> Path:
        """Write what this party owns, and nothing else, to ``model_party.safetensors``; `merge` reads it."""
        return save_model_party(self, Path(folder), {})

    def handle(self, message: Message) -> Message:
        """Answer one message.

        Raises:
            ProtocolError: The message breaks the protocol; the session is as it was before.
        """
        try:
            with self._lock:
                return self._answer(message)
        except _WRONG as error:
            # Facts of the wrong sort, or sizes that do not fit: torch says so in many ways.
            raise ProtocolError(
                f"The model party cannot carry out this {message.kind!r}: {type(error).__name__}: {error}"
            ) from error

    def _answer(self, message: Message) -> Message:
        if message.kind == "open":
            return self._open(message)
        if message.session not in self.sessions:
            raise ProtocolError(f"There is no session {message.session!r}: send 'open' first.")
        session = self.sessions[message.session]
        if message.step != session.step:
            raise ProtocolError(
                f"The data party is at step {message.step}, the model party at {session.step}. "
                "Load checkpoints of the same step on both sides."
            )
        session.forget(message.meta)
        if message.kind in ("forward", "backward", "norms", "commit"):
            self.shared.await_round(session)
        match message.kind:
            case "forward":
                return self._forward(session, message)
            case "backward":
                return self._backward(session, message)
            case "norms":
                return self._norms(session, message)
            case "commit":
                return self._commit(session, message)
            case "save":
                save_session(self, message.session, session.step, self.shared.optimizer)
                return _reply(message)
            case "release":
                return _reply(message)
            case _:
                self.shared.leave(message.session)
                return _reply(message)

    def _open(self, message: Message) -> Message:
        theirs = message.meta.get("fingerprint")
        if theirs != self.fingerprint:
            raise ProtocolError(
                "The parties do not hold two halves of the same model: the data party has "
                f"{differences(theirs, self.fingerprint)} at the model party. Use the same model, revision, "
                "dtype and partition on both sides."
            )
        session = Session(self.caps, step=message.step)
        weights = {c.name: c.tensor for c in message.tensors if c.role == "counterpart"}
        session.counterparts = [
            counterparts.build(spec, f"{n}.", weights)
            for n, spec in enumerate(message.meta.get("counterparts", ()))
        ]
        before = self.sessions.get(message.session)
        if before is not None:
            self.shared.await_round(before)
        if spec := message.meta.get("optimizer"):
            self.shared.join(session, before, spec)
        if before is not None:
            self.shared.replace(before, session)
        if (steps := message.meta.get("resume")) is not None:
            session.step = self._resume(message.session, steps, self.shared.optimizer)
        self.sessions[message.session] = session
        return _reply(message, meta={"step": session.step})

    def _resume(self, name: str, steps: Any, optimizer: torch.optim.Optimizer | None) -> int:
        if any(other.graphs for other in self.sessions.values()):
            raise ProtocolError(
                "A forward still waits for its backward: the weights it went through cannot be changed."
            )
        if any(s.trains and s.step for key, s in self.sessions.items() if key != name):
            raise ProtocolError(
                "Another data party trains these weights now. Go back to a checkpoint when it has closed."
            )
        return load_session(self, name, steps, optimizer)

    def _forward(self, session: Session, message: Message) -> Message:
        meta = message.meta
        program, chain = session.program(meta, self.chains)
        _check_leaves(program, message)
        leaves = [crossing.tensor.to(self.device) for crossing in message.tensors]
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
        if self.model.training != meta["training"]:
            self.model.train(meta["training"])
        with (
            session.cache(meta.get("cache"), chain.layers) as cache,
            torch.set_grad_enabled(grad),
            _autocast(meta.get("autocast"), leaves),
        ):
            there = session.counterparts if meta["counterparts"] else []
            for counterpart in reversed(there):  # what was done last is undone first
                for index, crossing in enumerate(message.tensors):
                    if crossing.role == "smashed":
                        leaves[index] = counterpart(leaves[index])
            before = None if program.id in session.programs else _own_state(self.model)
            outputs = Execution(chain.call, leaves, cache).run(program)
            if before is not None and (kept := before ^ _own_state(self.model)):
                raise ProtocolError(
                    f"{', '.join(sorted({name for name, _ in kept}))} keep what they computed in themselves, where "
                    "the sessions of several data parties would mix. Such a model cannot be held by a model party."
                )
        session.programs[program.id] = program
        live = [out.requires_grad for out in outputs]
        if any(live):
            session.graphs[message.exchange] = Graph(
                wanted, [End.of(out) for out in outputs], training=meta["training"]
            )
        crossings = tuple(
            Crossing("returned", "returned", out.detach(), let_go=True) for out in outputs
        )
        return _reply(message, crossings, {"live": live})

    def _backward(self, session: Session, message: Message) -> Message:
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
        answers = self._gradients(session, graph, ends, gradients, message.meta)
        if not keep:
            del session.graphs[message.exchange]
        return _reply(
            message, tuple(Crossing("smashed_grad", "smashed_grad", grad) for grad in answers)
        )

    def _gradients(
        self,
        session: Session,
        graph: Graph,
        ends: list[GradientEdge],
        gradients: list[Tensor],
        meta: Mapping[str, Any],
    ) -> list[Tensor]:
        """Go back through a graph. Weights get their gradients unless it is for `autograd.grad`."""
        keep = meta["keep"]
        self.model.train(graph.training)  # what is computed again must be computed as it was
        if not meta["accumulate"]:
            if not graph.inputs:
                return []
            found = torch.autograd.grad(
                ends, graph.inputs, gradients, retain_graph=keep, materialize_grads=True
            )
            return list(found)
        self.shared.show(session)
        torch.autograd.backward(ends, gradients, retain_graph=keep)
        answers = []
        for leaf in graph.inputs:
            answers.append(leaf.grad if leaf.grad is not None else torch.zeros_like(leaf))
            leaf.grad = None
        return answers

    def _norms(self, session: Session, message: Message) -> Message:
        self.shared.show(session)
        names, norms = norms_of(self.model)
        return _reply(message, (Crossing("norms", "norms", norms),), {"names": names})

    def _commit(self, session: Session, message: Message) -> Message:
        skip, scale, rate = (message.meta[key] for key in ("skip", "scale", "lr"))
        if not session.trains:
            raise ProtocolError(
                "This session was opened without an optimizer; there is no step to commit."
            )
        numbers = [rate] if scale is None else [rate, scale]
        fit = all(isinstance(n, float | int) and 0 <= n < math.inf for n in numbers)
        if not fit or not isinstance(skip, bool):
            raise ProtocolError(
                "A commit needs 'skip' (true or false), a 'scale' (None or a number >= 0) and a learning rate 'lr'."
            )
        self.shared.commit(session, scale=scale, rate=rate, skip=skip)
        session.step += 1
        self.steps[message.session] = session.step
        return _reply(message)


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


def _reply(
    message: Message, tensors: tuple[Crossing, ...] = (), meta: dict[str, Any] | None = None
) -> Message:
    return Message(
        message.kind,
        message.session,
        message.step,
        message.exchange,
        message.seq,
        message.phase,
        tensors,
        meta or {},
    )
