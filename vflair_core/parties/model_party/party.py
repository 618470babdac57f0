"""The model party: holds modules, runs what it was built to run, and answers messages."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from vflair_core.communication.channel import Channel
from vflair_core.communication.locks import Lock
from vflair_core.communication.message import Message, reply
from vflair_core.errors import (
    ChannelError,
    PartitionError,
    ProtocolError,
    SessionLostError,
    VflairError,
    shown,
)
from vflair_core.events import events
from vflair_core.parties.model_party import openings, rounds, steps
from vflair_core.parties.model_party.cache import Offer
from vflair_core.parties.model_party.caps import Caps
from vflair_core.parties.model_party.checkpoint import (
    check_saved,
    load_session,
    run_folder,
    save_model_party,
    save_session,
    saved_steps,
)
from vflair_core.parties.model_party.costs import Costs
from vflair_core.parties.model_party.held_stage import HeldStage
from vflair_core.parties.model_party.relay import Relay
from vflair_core.parties.model_party.session import Session
from vflair_core.parties.model_party.shared_weights import Rule, SharedWeights
from vflair_core.partition.slices import Slices
from vflair_core.partition.stages import Stage

NONCES = 64  # of openings of one session that are remembered


class ModelParty:
    """Holds modules of `model`, under the names the whole model gives them.

    It runs only programs that call one of the `stages` (names in call order) from its first module to its
    last, each output feeding the next call. What data parties may ask for is limited by `caps`; a request over a cap is
    refused, nothing is dropped. A refused message changes nothing.

    Several data parties may have a session each. `sharing` says when the weights they share take a step.
    Set `checkpoints` to a folder to let data parties have their runs saved there and go on from it. Set `expiry` to the
    seconds after which a data party that was not heard from is taken for gone, a forward for one without a backward, and
    a round of ``"mean"`` goes on without those it waits for; None waits for ever. What is over is forgotten with the next
    message of anybody, or by `expire`. `drop` forgets a data party by hand.
    """

    def __init__(
        self,
        model: nn.Module,
        stages: Sequence[Stage],
        fingerprint: str,
        slices: Slices,
        config: PreTrainedConfig
        | None = None,  # of the whole model; None: blocks without caches of their own kinds
    ) -> None:
        self.model, self.slices, self.config = model, slices, config
        self._hold(stages)
        self.fingerprint = fingerprint
        self.caps = Caps.fitted(self.device, config and config.get_text_config(decoder=True))
        self._offer = Offer.of(config)
        self.sessions: dict[str, Session] = {}
        self.shared = SharedWeights(model, self.sessions)
        self._lock = Lock()
        self.steps: dict[str, int] = {}  # taken on these weights, by session
        self.checkpoints: str | Path | None = None
        self.onward: Channel | None = None  # to the next model party of a chain
        self.expiry: float | None = None  # seconds

    def pass_on(self, stages: Sequence[Stage], onward: Channel) -> None:
        """Run only `stages` from now on, and let the party behind `onward` run what follows them."""
        self._hold(stages)
        self.onward = onward
        for name, session in self.sessions.items():
            self._open_onward(name, session, None, None, None)

    def _hold(self, stages: Sequence[Stage]) -> None:
        self.held = [HeldStage(self.model, stage) for stage in stages]
        self._costs = Costs.of(self.model, self.config)

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
            ProtocolError: There is no such session.
        """
        with self._lock:
            if session not in self.sessions:
                raise ProtocolError(
                    f"There is no session {shown(session)}. There are: {', '.join(self.sessions) or 'none'}."
                )
            self._close(session)

    def expire(self, asking: str | None = None) -> None:
        """Forget what was not heard of for `expiry` seconds; nothing of who is `asking`."""
        if self.expiry is None:
            return
        with self._lock:
            late = {id(session) for session in self.shared.late(self.expiry)}
            now = time.monotonic()
            for name, session in list(self.sessions.items()):
                silent = name != asking and now - session.heard > self.expiry
                if silent or id(session) in late:
                    events(__name__).warning(
                        "session_expired", session=name[:16], silent=round(now - session.heard)
                    )
                    self._close(name)
                    continue
                for number, graph in list(session.graphs.items()):
                    if now - graph.made > self.expiry:
                        del session.graphs[number]

    def _close(self, name: str) -> None:
        onward = self.sessions[name].onward
        self.shared.leave(name)
        if onward is not None:
            try:
                onward.connection.request("close")
            except (
                ChannelError,
                ProtocolError,
            ) as error:  # it has none of this session then, or expires it
                events(__name__).warning("onward_not_closed", session=name[:16], why=str(error))

    def handle(self, message: Message) -> Message:
        """Answer one message. The last one of a session may come again, and gets the same answer.

        Raises:
            VflairError: The message breaks the protocol, or cannot be carried out; the session is as it was before.
        """
        try:
            with self._lock:
                self.expire(message.session)
                session = self.sessions.get(message.session)
                if session is None:
                    return self._begin(message)
                if (answer := session.said_before(message)) is not None:
                    return answer
                return self._answer_in(session, message)
        except VflairError:
            raise
        except Exception as error:
            # Facts of the wrong sort, or sizes that do not fit: torch says so in many ways, with much that is nobody's
            # business.
            events(__name__).warning(
                "message_failed", kind=message.kind, session=message.session[:16], exc_info=True
            )
            raise ProtocolError(
                f"The model party cannot carry out this {message.kind!r}: {_in_short(error)}"
            ) from error

    def _begin(self, message: Message) -> Message:
        if message.kind == "close":  # it is
            return reply(message)
        if message.kind != "open":
            raise SessionLostError(
                f"There is no session {shown(message.session)}: send 'open' first."
            )
        return self._opened(message)

    def _opened(self, message: Message) -> Message:
        answer = self._open(message)
        return self._answered(self.sessions[message.session], message, answer)

    def _answer_in(self, session: Session, message: Message) -> Message:
        if message.kind == "open":
            return self._opened(message)
        session.heard = time.monotonic()
        if message.kind == "close":
            self._close(message.session)
            return reply(message)
        if message.step != session.step:
            raise ProtocolError(
                f"The data party is at step {message.step}, the model party at {session.step}. "
                "Load checkpoints of the same step on both sides."
            )
        room = self._ground.room_for_caches(session, self.caps)
        with session.forgetting(message.meta, room):
            answer = self._answer(session, message)
        return self._answered(session, message, answer)

    def _answered(self, session: Session, message: Message, answer: Message) -> Message:
        others = sum(s.kept for s in self.sessions.values() if s is not session)
        return session.answered(message, answer, self.caps.reply_bytes - others)

    @property
    def _ground(self) -> rounds.Ground:
        return rounds.Ground(
            self.model, self.held, self.device, self._costs, self.sessions.values()
        )

    def _answer(self, session: Session, message: Message) -> Message:
        if message.kind in ("forward", "backward", "norms", "prepare", "commit"):
            self.shared.await_round(session)
        match message.kind:
            case "forward":
                if message.meta["grad"] and not message.once:
                    self.shared.await_turn(session)
                return rounds.forward(self._ground, session, message)
            case "backward":
                return rounds.backward(self.model, self.shared, session, message)
            case "facts":
                return self._facts(session, message)
            case "norms":
                return steps.norms(self.model, self.shared, session, message)
            case "prepare":
                steps.prepare(self.shared, session, message)
                return reply(message)
            case "commit":
                steps.commit(self.shared, session, message)
                self.steps[message.session] = session.step
                return reply(message)
            case "save":
                self._save(session, message)
            case "release":
                self._abandon(session, message.meta)
            case _:
                raise ProtocolError(f"There is no message of kind {shown(message.kind)}.")
        if session.onward is not None:
            kept = {k: v for k, v in message.meta.items() if k in ("keep", "abandoned")}
            session.onward.connection.request(message.kind, meta=kept)
        return reply(message)

    def _abandon(self, session: Session, meta: Mapping[str, Any]) -> None:
        """Begin the session's step anew, if it says so: from the exchange on that it names, nothing waits for a backward."""
        first = meta.get("abandoned")
        if first is None:
            return
        if type(first) is not int:
            raise ProtocolError(
                f"'abandoned' must be the number of an exchange, not {shown(first)}."
            )
        for number in [number for number in session.graphs if number >= first]:
            del session.graphs[number]
        self.shared.abandon(session)
        session.begin_step(anew=True)

    def _save(self, session: Session, message: Message) -> None:
        folder = run_folder(self.checkpoints, message.session)
        what = (self.model, self.fingerprint, self.steps, self.shared.optimizer)
        with session.drawing(self.device, own=not message.once):
            save_session(folder, session.step, *what, keep=message.meta.get("keep"), caps=self.caps)

    def _open(self, message: Message) -> Message:
        meta, name = message.meta, message.session
        openings.check(message, self.fingerprint, self.caps, self.sessions)
        nonces = self.sessions[name].nonces if name in self.sessions else ()
        session = Session(
            self.caps, self._offer, message.step, (*nonces[-NONCES:], meta.get("nonce"))
        )
        session.counterparts = openings.counterparts_of(message)
        before = self.sessions.get(name)
        if before is not None:
            self.shared.await_round(before)
        back, spec = meta.get("resume"), meta.get("optimizer")
        optimizer, wanted = self.shared.optimizer_for(before, spec) if spec else (None, {})
        if back is not None:
            openings.check_resume(name, back, self.sessions)
        if self.onward is not None:
            back = self._open_onward(name, session, spec, optimizer, back)
        if back is not None:
            folder = run_folder(self.checkpoints, name)
            with session.drawing(self.device, own=not message.once):
                what = (self.model, self.fingerprint, optimizer)
                session.step, taken = load_session(folder, list(back), *what)
            session.begin_step()
            self.steps.update(taken)
        if spec:
            self.shared.join(session, optimizer, wanted)
        if before is not None:
            self.shared.replace(before)
        self.sessions[name] = session
        fresh = session.step == 0 and any(weight.requires_grad for weight in self.parameters())
        moved = sum(steps for other, steps in self.steps.items() if fresh and other != name)
        return reply(message, meta={"step": session.step, "moved": moved})

    def _open_onward(
        self, name: str, session: Session, spec: Any, optimizer: Any, back: list[int] | None
    ) -> list[int] | None:
        """Open the session with the next party of a chain too; return the step it went back to, if it did."""
        assert self.onward is not None
        both = None
        if (
            back is not None
        ):  # what is here is seen to be whole before the next party goes back to it
            folder = run_folder(self.checkpoints, name)
            both = sorted(saved_steps(folder) & set(back))
            check_saved(folder, both, self.model, self.fingerprint, optimizer)
        relay = Relay.to(self.onward, self.fingerprint, name, session.step, self.model)
        step: int = relay.connection.open(optimizer=spec, resume=both)["step"]
        session.onward, relay.connection.step = relay, step
        return None if both is None else [step]

    def _facts(self, session: Session, message: Message) -> Message:
        trainable = [name for name, weight in self.named_parameters() if weight.requires_grad]
        keeps = self.checkpoints is not None
        if session.onward is not None:
            further = session.onward.connection.facts()
            trainable, keeps = trainable + further["trainable"], keeps and further["keeps"]
        return reply(message, meta={"trainable": trainable, "keeps": keeps})


def _in_short(error: Exception) -> str:
    """The first line of an error, without where things lie on this machine."""
    line = next(iter(str(error).splitlines()), "")
    words = [word if word.count("/") < 2 else "…" for word in line.split(" ")]
    return f"{type(error).__name__}: {' '.join(words)[:300]}"
