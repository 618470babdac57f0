"""The model party: holds modules, runs the one chain of calls it was built for, and answers messages."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from attrs import define, field
from torch import Tensor, nn
from transformers.cache_utils import Cache

from vflair_core import cache as caches
from vflair_core.absent import ALLOWED
from vflair_core.checkpoint import save_weights
from vflair_core.codec import DTYPES
from vflair_core.errors import ProtocolError
from vflair_core.message import Crossing, Message
from vflair_core.program import Execution, Program, Step

_WRONG = (AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)
OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
COUNTERPARTS = {"linear": nn.Linear, "layer_norm": nn.LayerNorm}


@define(eq=False)
class Graph:
    """A forward whose backward may still come."""

    inputs: list[Tensor]
    outputs: list[Tensor]


@define(eq=False)
class Session:
    """What the model party remembers of one data party."""

    programs: dict[str, Program] = field(factory=dict)
    graphs: dict[int, Graph] = field(factory=dict)
    caches: dict[str, Cache] = field(factory=dict)
    counterparts: list[nn.Module] = field(factory=list)
    optimizer: torch.optim.Optimizer | None = None
    trains: bool = False
    step: int = 0


class ModelParty:
    """Holds the modules `chain` (names in call order) of `model`, under the names the whole model gives them.

    It runs only programs that call the chain once, in order, each output feeding the next call. Live
    graphs, caches and programs are capped per session; a request over a cap is refused, nothing is dropped.
    """

    max_graphs = 256
    max_caches = 64
    max_programs = 1024

    def __init__(self, model: nn.Module, chain: tuple[str, ...], fingerprint: str) -> None:
        self.model = model
        self.chain = chain
        self.fingerprint = fingerprint
        self.sessions: dict[str, Session] = {}
        modules = [model.get_submodule(name) for name in chain]
        self._modules = dict(zip(chain, modules, strict=True))
        self._arguments = {
            name: frozenset(inspect.signature(module.forward).parameters)
            for name, module in self._modules.items()
        }
        self._layers = sorted(
            {
                index
                for module in modules
                for part in module.modules()
                if isinstance(index := getattr(part, "layer_idx", None), int)
            }
        )

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Weights by the names they have in the whole model."""
        return self.model.named_parameters()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Weights, in the order of the whole model."""
        return self.model.parameters()

    @property
    def device(self) -> torch.device:
        """Where messages are brought: the device of the first weight."""
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    def save(self, folder: str | Path, step: int) -> Path:
        """Write the weights this party owns, and nothing else, to ``model_party.safetensors``."""
        return save_weights(
            Path(folder) / "model_party.safetensors", self.model, self.fingerprint, step
        )

    def handle(self, message: Message) -> Message:
        """Answer one message.

        Raises:
            ProtocolError: The message breaks the protocol; the session is as it was before.
        """
        try:
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
        for number in message.meta.get("released_graphs", ()):
            session.graphs.pop(number, None)
        for old, new in message.meta.get("copied_caches", ()):
            if len(session.caches) >= self.max_caches:
                raise ProtocolError(
                    f"A session may keep {self.max_caches} caches; delete unused ones."
                )
            session.caches[new] = copy.deepcopy(session.caches[old])
        for key in message.meta.get("released_caches", ()):
            session.caches.pop(key, None)
        match message.kind:
            case "forward":
                return self._forward(session, message)
            case "backward":
                return self._backward(session, message)
            case "norms":
                return self._norms(message)
            case "commit":
                return self._commit(session, message)
            case "release":
                return _reply(message)
            case _:
                del self.sessions[message.session]
                return _reply(message)

    def _open(self, message: Message) -> Message:
        theirs = message.meta.get("fingerprint")
        if theirs != self.fingerprint:
            raise ProtocolError(
                f"The parties do not hold two halves of the same model: fingerprint {theirs} against "
                f"{self.fingerprint}. Use the same config, revision and partition on both sides."
            )
        session = Session(step=message.step)
        if spec := message.meta.get("optimizer"):
            session.optimizer, session.trains = _optimizer(self.model, spec), True
        weights = {c.name: c.tensor for c in message.tensors if c.role == "counterpart"}
        session.counterparts = [
            _counterpart(spec, f"{n}.", weights)
            for n, spec in enumerate(message.meta.get("counterparts", ()))
        ]
        self.sessions[message.session] = session
        return _reply(message)

    def _forward(self, session: Session, message: Message) -> Message:
        meta = message.meta
        program = self._program(session, meta)
        _check_leaves(program, message)
        leaves = [crossing.tensor.to(self.device) for crossing in message.tensors]
        grad = bool(meta["grad"])
        if not isinstance(meta["training"], bool) or not all(index >= 0 for index in meta["wants"]):
            raise ProtocolError(
                "'training' must be true or false and 'wants' must count tensors from 0."
            )
        wanted = [leaves[index].requires_grad_() for index in meta["wants"]] if grad else []
        if grad and len(session.graphs) >= self.max_graphs:
            raise ProtocolError(
                f"{self.max_graphs} forwards wait for their backward. Use torch.no_grad() where none comes."
            )
        if self.model.training != meta["training"]:
            self.model.train(meta["training"])
        with (
            self._cache(session, meta.get("cache")) as cache,
            torch.set_grad_enabled(grad),
            _autocast(meta.get("autocast"), leaves),
        ):
            for counterpart in reversed(session.counterparts):  # what was done last is undone first
                for index, crossing in enumerate(message.tensors):
                    if crossing.role == "smashed":
                        leaves[index] = counterpart(leaves[index])
            outputs = Execution(self._call, leaves, cache).run(program)
        session.programs[program.id] = program
        live = [out.requires_grad for out in outputs]
        if any(live):
            session.graphs[message.exchange] = Graph(wanted, outputs)
        crossings = tuple(Crossing("returned", "returned", out) for out in outputs)
        return _reply(message, crossings, {"live": live})

    def _call(self, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        return self._modules[name](*args, **kwargs)

    def _backward(self, session: Session, message: Message) -> Message:
        graph = session.graphs.get(message.exchange)
        if graph is None:
            raise ProtocolError(
                f"Exchange {message.exchange} has no graph to go back through: it was freed by its first "
                "backward (pass retain_graph=True to keep it) or ran without gradients."
            )
        keep = bool(message.meta["keep"])
        numbers = message.meta["outputs"]
        if not numbers or len(set(numbers)) != len(numbers) or min(numbers) < 0:
            raise ProtocolError(f"{numbers} are not outputs that a gradient can come for.")
        pairs = zip(numbers, message.tensors, strict=True)
        outputs, gradients = [], []
        for index, crossing in pairs:
            outputs.append(graph.outputs[index])
            gradients.append(crossing.tensor.to(outputs[-1].device))
            if (
                crossing.tensor.shape != outputs[-1].shape
                or crossing.tensor.dtype != outputs[-1].dtype
            ):
                raise ProtocolError(
                    f"A gradient of shape {tuple(crossing.tensor.shape)} came for an output of shape "
                    f"{tuple(outputs[-1].shape)}."
                )
        torch.autograd.backward(outputs, gradients, retain_graph=keep)
        if not keep:
            del session.graphs[message.exchange]
        answers = []
        for leaf in graph.inputs:
            gradient = leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)
            answers.append(Crossing("smashed_grad", "smashed_grad", gradient))
            leaf.grad = None
        return _reply(message, tuple(answers))

    def _norms(self, message: Message) -> Message:
        named = [(name, p.grad) for name, p in self.named_parameters() if p.grad is not None]
        norms = torch.tensor([])
        if named:
            norms = torch.stack([torch.linalg.vector_norm(grad).cpu() for _, grad in named])
        meta = {"names": [name for name, _ in named]}
        return _reply(message, (Crossing("norms", "norms", norms),), meta)

    def _commit(self, session: Session, message: Message) -> Message:
        meta = message.meta
        if not session.trains:
            raise ProtocolError(
                "This session was opened without an optimizer; there is no step to commit."
            )
        if any(other.graphs for other in self.sessions.values()):
            raise ProtocolError(
                "A forward still waits for its backward: the weights it went through cannot be changed."
            )
        skip, scale, rate = meta["skip"], meta["scale"], meta["lr"]
        if not isinstance(rate, float | int) or not isinstance(scale, float | int | None):
            raise ProtocolError(
                "A commit needs 'skip', a 'scale' (a number or None) and a learning rate 'lr'."
            )
        if session.optimizer is not None and not skip:
            for parameter in self.model.parameters():
                if parameter.grad is not None and meta["scale"] is not None:
                    parameter.grad.mul_(meta["scale"])
            for group in session.optimizer.param_groups:
                group["lr"] = meta["lr"]
            session.optimizer.step()
        for parameter in self.model.parameters():
            parameter.grad = None
        session.step += 1
        return _reply(message)

    def _program(self, session: Session, meta: Any) -> Program:
        if "program" in meta:
            program = Program.from_wire(meta["program"])
            self._check_chain(program)
            if len(session.programs) >= self.max_programs:
                raise ProtocolError(f"A session may register {self.max_programs} programs.")
            if program.id == meta["id"]:
                return program
        if meta["id"] not in session.programs:
            raise ProtocolError(f"Program {meta['id']} was not registered in this session.")
        return session.programs[meta["id"]]

    def _check_chain(self, program: Program) -> None:
        """Each module once, in order, each step fed by the one before it."""
        if program.modules != self.chain or program.output != ():
            raise ProtocolError(
                f"A program must call {self.chain[0]} … {self.chain[-1]} once each, in order, and return the "
                f"last output. This one calls {', '.join(program.modules)}."
            )
        for number, step in enumerate(program.steps):
            self._check_step(step)
            if number and not any(source == number - 1 for source in _sources(step)):
                raise ProtocolError(
                    f"Step {number} ({step[1]}) does not use the output of the step before."
                )
            if any(source >= number for source in _sources(step)):
                raise ProtocolError(
                    f"Step {number} ({step[1]}) uses an output that does not exist yet."
                )

    def _check_step(self, step: Step) -> None:
        """An operation takes one value and numbers, so that nothing it gives is larger; a call, known names."""
        kind, name, args, kwargs = step
        if kind == "module":
            unknown = [key for key, _ in kwargs if key not in self._arguments[name] | ALLOWED]
            if unknown or args:
                raise ProtocolError(f"{name} is called by name, and with nothing like {unknown}.")
            return
        others = [*args[1:], *dict(kwargs).values()]
        if not args or args[0][0] not in ("out", "leaf") or not all(map(_is_number, others)):
            raise ProtocolError(f"Operation {name!r} takes one tensor, then numbers.")

    @contextmanager
    def _cache(self, session: Session, spec: Any) -> Iterator[Cache | None]:
        """Lend the session's cache; if what is done with it fails, it is as it was before."""
        if spec is None:
            yield None
            return
        key = spec["id"]
        known = session.caches.get(key)
        before = [copy.copy(layer) for layer in known.layers] if known else []
        try:
            yield self._prepared_cache(session, spec)
        except BaseException:
            if known:
                known.layers[:] = before
            else:
                session.caches.pop(key, None)
            raise

    def _prepared_cache(self, session: Session, spec: Any) -> Cache:
        key = spec["id"]
        if key not in session.caches:
            if "layers" not in spec:
                raise ProtocolError(f"There is no cache {key!r} in this session.")
            if len(session.caches) >= self.max_caches:
                raise ProtocolError(
                    f"A session may keep {self.max_caches} caches; delete unused ones."
                )
            if not self._layers or not max(self._layers) < len(spec["layers"]) <= 4096:
                raise ProtocolError(
                    f"A cache of {len(spec['layers'])} layers does not fit this model."
                )
            session.caches[key] = caches.build(spec["layers"])
        found = session.caches[key]
        caches.repeat(found, spec["deeds"], self._layers)
        return found


def _is_number(tree: Any) -> bool:
    if tree[0] == "tuple":
        return all(map(_is_number, tree[1:]))
    return tree[0] in ("dtype", "slice", "ellipsis") or (
        tree[0] == "value" and not isinstance(tree[1], str)
    )


def _sources(step: Step) -> list[int]:
    found = []

    def walk(tree: Any) -> None:
        if tree[0] == "out":
            found.append(tree[1])
        elif tree[0] in ("tuple", "list"):
            for item in tree[1:]:
                walk(item)
        elif tree[0] == "dict":
            for _, item in tree[1:]:
                walk(item)

    for tree in (*step[2], *(tree for _, tree in step[3])):
        walk(tree)
    return found


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


def _optimizer(model: nn.Module, spec: dict[str, Any]) -> torch.optim.Optimizer | None:
    options = dict(spec)
    name = options.pop("name")
    if name not in OPTIMIZERS:
        raise ProtocolError(f"Optimizer {name!r} is not on the list: {', '.join(OPTIMIZERS)}.")
    parameters = [p for p in model.parameters() if p.requires_grad]
    return OPTIMIZERS[name](parameters, **options) if parameters else None


def _counterpart(spec: dict[str, Any], prefix: str, weights: dict[str, Tensor]) -> nn.Module:
    kind = spec["kind"]
    if kind not in COUNTERPARTS:
        raise ProtocolError(f"Counterpart {kind!r} is not on the list: {', '.join(COUNTERPARTS)}.")
    own = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    # No memory for what the options claim, only for the weights that came.
    with torch.device("meta"):
        module: nn.Module = COUNTERPARTS[kind](**spec["options"])
    module.load_state_dict(own, assign=True)
    return module.requires_grad_(False)


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
