"""The model party: holds modules, runs what it was built to run, and answers messages."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from vflair_core.communication import counterparts
from vflair_core.communication.channel import Channel
from vflair_core.communication.locks import Lock
from vflair_core.communication.message import Crossing, Message, reply
from vflair_core.communication.optimizers import check_options
from vflair_core.errors import PartitionError, ProtocolError
from vflair_core.parties.model_party import rounds
from vflair_core.parties.model_party.caps import Caps
from vflair_core.parties.model_party.checkpoint import (
    load_session,
    run_folder,
    save_model_party,
    save_session,
    saved_steps,
)
from vflair_core.parties.model_party.held_stage import HeldStage
from vflair_core.parties.model_party.relay import Relay
from vflair_core.parties.model_party.session import Session, StepOptions
from vflair_core.parties.model_party.shared_weights import Rule, SharedWeights, norms_of
from vflair_core.partition.fingerprint import differences
from vflair_core.partition.slices import Slices
from vflair_core.partition.stages import Stage

_WRONG = (AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)


class ModelParty:
    """Holds modules of `model`, under the names the whole model gives them.

    It runs only programs that call one of the `stages` (names in call order) from its first module to its
    last, each output feeding the next call. Live graphs, caches and programs are capped per session; a
    request over a cap is refused, nothing is dropped.

    Several data parties may have a session each. `sharing` says when the weights they share take a step.
    Set `checkpoints` to a folder to let data parties have their runs saved there and go on from it. Set `expiry` to the
    seconds after which a data party that was not heard from is taken for gone, and forgotten when another one asks for
    something; None waits for ever. `drop` forgets one by hand.
    """

    def __init__(
        self, model: nn.Module, stages: Sequence[Stage], fingerprint: str, slices: Slices
    ) -> None:
        self.model, self.slices = model, slices
        self.held = [HeldStage(model, names) for names in stages]
        self.fingerprint = fingerprint
        self.caps = Caps()
        self.sessions: dict[str, Session] = {}
        self.shared = SharedWeights(model, self.sessions)
        self._lock = Lock()
        self.steps: dict[str, int] = {}  # taken on these weights, by session
        self.checkpoints: str | Path | None = None
        self.onward: Channel | None = None  # to the next model party of a chain
        self.expiry: float | None = None  # seconds

    def pass_on(self, stages: Sequence[Stage], onward: Channel) -> None:
        """Run only `stages` from now on, and let the party behind `onward` run what follows them."""
        self.held = [HeldStage(self.model, stage) for stage in stages]
        self.onward = onward
        for name, session in self.sessions.items():
            self._open_onward(name, session, None, None)

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
        # As the first of `parameters()`, which makes ready for all of them.
        weights = (p for m in self.model.modules() for p in m._parameters.values() if p is not None)
        return next((weight.device for weight in weights), torch.device("cpu"))

    def save(self, folder: str | Path) -> Path:
        """Write what this party owns, and nothing else, to ``model_party.safetensors``; `merge` reads it."""
        return save_model_party(Path(folder), self.model, self.fingerprint, self.steps)

    def drop(self, session: str) -> None:
        """Forget a data party, with its graphs, caches and gradients; a round that waited for it alone ends.

        Args:
            session: As `sessions` and the errors name it.

        Raises:
            ProtocolError: There is no such session, or the round cannot end yet.
        """
        with self._lock:
            if session not in self.sessions:
                raise ProtocolError(
                    f"There is no session {session!r}. There are: {', '.join(self.sessions) or 'none'}."
                )
            onward = self.sessions[session].onward
            self.shared.leave(session)
            if onward is not None:
                onward.connection.request("close")

    def _drop_silent(self, asking: str) -> None:
        """Forget who has not been heard from for too long, where a round that waits for them can end."""
        if self.expiry is None:
            return
        now = time.monotonic()
        for name, session in list(self.sessions.items()):
            late = name != asking and now - session.heard > self.expiry
            if late and self.shared.may_leave(name):
                self.drop(name)

    def handle(self, message: Message) -> Message:
        """Answer one message.

        Raises:
            ProtocolError: The message breaks the protocol; the session is as it was before.
        """
        try:
            with self._lock:
                self._drop_silent(message.session)
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
        session.heard = time.monotonic()
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
                return rounds.forward(self.model, self.held, self.device, session, message)
            case "backward":
                return rounds.backward(self.model, self.shared, session, message)
            case "facts":
                return self._facts(session, message)
            case "norms":
                return self._norms(session, message)
            case "commit":
                return self._commit(session, message)
            case "save":
                folder = run_folder(self.checkpoints, message.session)
                what = (self.model, self.fingerprint, self.steps, self.shared.optimizer)
                save_session(folder, session.step, *what, keep=message.meta.get("keep"))
            case "close":
                self.shared.leave(message.session)
            case _:
                pass  # "release": what was let go of is forgotten by now
        if session.onward is not None:
            kept = {k: v for k, v in message.meta.items() if k == "keep"}
            session.onward.connection.request(message.kind, meta=kept)
        return reply(message)

    def _open(self, message: Message) -> Message:
        meta, name = message.meta, message.session
        if meta.get("fingerprint") != self.fingerprint:
            raise ProtocolError(
                "The parties do not hold two halves of the same model: the data party has "
                f"{differences(meta.get('fingerprint'), self.fingerprint)} at the model party. Use the same model, "
                "revision, dtype and partition on both sides."
            )
        session = Session(self.caps, step=message.step)
        weights = {c.name: c.tensor for c in message.tensors if c.role == "counterpart"}
        session.counterparts = [
            counterparts.build(spec, f"{n}.", weights)
            for n, spec in enumerate(meta.get("counterparts", ()))
        ]
        before = self.sessions.get(name)
        if before is not None:
            self.shared.await_round(before)
        steps = meta.get("resume")
        if steps is not None:
            self._check_resume(name)
        if self.onward is not None:
            both = (
                None
                if steps is None
                else sorted(saved_steps(run_folder(self.checkpoints, name)) & set(steps))
            )
            steps = self._open_onward(name, session, meta.get("optimizer"), both)
        if spec := meta.get("optimizer"):
            self.shared.join(session, before, spec)
        if before is not None:
            self.shared.replace(before, session)
        if steps is not None:
            folder = run_folder(self.checkpoints, name)
            what = (self.model, self.fingerprint, self.shared.optimizer)
            session.step, taken = load_session(folder, steps, *what)
            self.steps.update(taken)
        self.sessions[name] = session
        fresh = session.step == 0
        moved = sum(steps for other, steps in self.steps.items() if fresh and other != name)
        return reply(message, meta={"step": session.step, "moved": moved})

    def _open_onward(
        self, name: str, session: Session, optimizer: Any, resume: list[int] | None
    ) -> list[int] | None:
        """Open the session with the next party of a chain too; return the step it went back to, if it did."""
        assert self.onward is not None
        relay = Relay.to(self.onward, self.fingerprint, name, session.step, self.model)
        step: int = relay.connection.open(optimizer=optimizer, resume=resume)["step"]
        session.onward, relay.connection.step = relay, step
        return None if resume is None else [step]

    def _check_resume(self, name: str) -> None:
        if any(other.graphs for other in self.sessions.values()):
            raise ProtocolError(
                "A forward still waits for its backward: the weights it went through cannot be changed."
            )
        if any(s.trains and s.step for key, s in self.sessions.items() if key != name):
            raise ProtocolError(
                "Another data party trains these weights now. Go back to a checkpoint when it has closed."
            )

    def _facts(self, session: Session, message: Message) -> Message:
        trainable = [name for name, weight in self.named_parameters() if weight.requires_grad]
        keeps = self.checkpoints is not None
        if session.onward is not None:
            further = session.onward.connection.facts()
            trainable, keeps = trainable + further["trainable"], keeps and further["keeps"]
        return reply(message, meta={"trainable": trainable, "keeps": keeps})

    def _norms(self, session: Session, message: Message) -> Message:
        self.shared.show(session)
        names, norms = norms_of(self.model)
        if session.onward is not None:
            theirs = session.onward.connection.request("norms")
            names += theirs.meta["names"]
            norms = torch.cat([norms, theirs.tensors[0].tensor])
        return reply(message, (Crossing("norms", "norms", norms),), {"names": names})

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
        groups = message.meta.get("groups")
        if groups is not None:
            check_options(self.shared.optimizer, groups)
        rule = message.meta.get("sharing", self.sharing)
        if rule != self.sharing:
            raise ProtocolError(
                f"The party before shares weights by {rule!r} and this one by {self.sharing!r}: set the same "
                "`sharing` at all model parties of a chain."
            )
        step = StepOptions(rate, groups)
        self.shared.check(session, step)
        if session.onward is not None:  # it goes first: if it refuses, nothing has changed here
            session.onward.connection.commit(
                scale=scale, rate=rate, skip=skip, groups=groups, sharing=self.sharing
            )
        self.shared.commit(session, scale=scale, options=step, skip=skip)
        session.step += 1
        self.steps[message.session] = session.step
        return reply(message)
