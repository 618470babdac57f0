"""The weights that all sessions of a model party share: whose gradients they hold, when they take a step.

A weight has one `.grad`, and several data parties may go backward through it. So the `.grad` of the weights
is always that of one session; those of the others are put away until it is their turn. There is one
optimizer, and one of two rules says when it takes a step:

- ``"turns"``: each commit is a step of its own, with the gradients of the session that commits.
- ``"mean"``: a round ends when all training sessions have committed; one step is taken with the mean of their
  gradients, each scaled as its data party said. Who skips is left out of the mean.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from vflair_core.communication.optimizers import make_optimizer, set_options
from vflair_core.errors import BusyError, ProtocolError, alternatives, shown
from vflair_core.parties.model_party.session import Session, StepOptions

WAITING = 5.0  # seconds that others let pass for who waits to take a step and does not ask again
LARGEST_NORM = 1e18  # of a gradient: optimizers square it
Rule = Literal["turns", "mean"]


class SharedWeights:
    """The trainable state of `model`: its gradients by session, its one optimizer, its rule."""

    def __init__(self, model: nn.Module, sessions: dict[str, Session]) -> None:
        self.model, self.sessions = model, sessions
        self.optimizer: torch.optim.Optimizer | None = None
        self._rule: Rule = "turns"
        self._spec: dict[str, Any] = {}
        self._waiting: Session | None = (
            None  # who would take a step, were there no graphs of others
        )
        self._until = 0.0  # when it is taken not to wait any more
        self._holder: Session | None = None  # whose gradients the weights hold now

    @property
    def rule(self) -> Rule:
        """When shared weights take a step: turns or mean."""
        return self._rule

    @rule.setter
    def rule(self, rule: Rule) -> None:
        if rule not in get_args(Rule):
            raise ProtocolError(
                f"There is no rule {rule!r} for shared weights.{alternatives(rule, get_args(Rule))}"
            )
        if any(session.deposit is not None for session in self.sessions.values()):
            raise ProtocolError("A round is under way; change the rule when it has ended.")
        self._rule = rule

    def optimizer_for(
        self, before: Session | None, spec: Mapping[str, Any]
    ) -> tuple[torch.optim.Optimizer | None, dict[str, Any]]:
        """The optimizer of a session that will train, in place of `before`, and what it was made by (`join`).

        It is that of those who train already, or a fresh one. Nothing is changed.

        Raises:
            ProtocolError: Others train, with another optimizer than `spec` asks for, or none can be made of it.
        """
        if not isinstance(spec, Mapping):
            raise ProtocolError(f"An optimizer has a name and options; {shown(spec)} came.")
        others = [s for s in self.sessions.values() if s.trains and s is not before]
        wanted = _without_rates(spec)
        made = make_optimizer(self.model, spec)
        if not others:
            return made, wanted
        if wanted != self._spec:
            raise ProtocolError(
                f"Other data parties train these weights with {self._spec}, and one optimizer serves all. "
                f"{shown(wanted)} was asked for; use the same one, or wait until the others have closed."
            )
        return self.optimizer, self._spec

    def join(
        self, session: Session, optimizer: torch.optim.Optimizer | None, spec: dict[str, Any]
    ) -> None:
        """Let `session` train, with what `optimizer_for` returned."""
        self.optimizer, self._spec = optimizer, spec
        session.trains = True

    def replace(self, before: Session) -> None:
        """Drop the gradients of a session that another one takes the place of: that begins anew."""
        if self._holder is before:
            self.clear(before)
            self._holder = None

    def show(self, session: Session) -> None:
        """Let the weights hold the gradients of `session`, and put away those of whoever was there."""
        if self._holder is session:
            return
        weights = list(self.model.parameters())
        if self._holder is not None:
            self._check_put_away()
            self._holder.gradients = {p: p.grad for p in weights if p.grad is not None}
        if self._holder is not None or session.gradients:
            for weight in weights:
                weight.grad = session.gradients.get(weight)
        session.gradients, self._holder = {}, session

    def _check_put_away(self) -> None:
        held = sum(g.nbytes for s in self.sessions.values() for g in s.gradients.values())
        held += sum(p.grad.nbytes for p in self.model.parameters() if p.grad is not None)
        caps = next(iter(self.sessions.values())).caps if self.sessions else None
        if caps is not None and held > caps.gradient_bytes:
            raise ProtocolError(
                f"The gradients of all sessions would take {held} bytes; the model party allows {caps.gradient_bytes} (its limit "
                "gradient_bytes). Go on when others have taken their step or closed."
            )

    def leave(self, name: str) -> None:
        """Forget a session and its gradients. A round that waited for it alone ends."""
        session = self.sessions[name]
        if self._would_end_round(session):
            self._make_way(session, at_once=True)
        if self._holder is session:
            self.clear(session)
            self._holder = None
        del self.sessions[name]
        self._end_round()

    def _would_end_round(self, without: Session) -> bool:
        others = [s for s in self.sessions.values() if s is not without]
        return any(s.deposit is not None for s in others) and not self._missing(but=without)

    def clear(self, session: Session) -> None:
        """Drop the gradients of `session`, as `zero_grad` does."""
        self.show(session)
        session.largest = None
        for weight in self.model.parameters():
            weight.grad = None

    def spoil(self, session: Session) -> None:
        """A backward of the session broke off: what there is of its gradients is worth nothing."""
        self.clear(session)
        session.spoiled = True

    def abandon(self, session: Session) -> None:
        """Begin the session's step anew."""
        self.clear(session)
        session.spoiled = False

    def check_whole(self, session: Session) -> None:
        """See that no backward of the session's step broke off.

        Raises:
            ProtocolError: One did.
        """
        if session.spoiled:
            raise ProtocolError(
                "A backward of this step broke off at the model party, and its gradients are gone. Take the step again from "
                "its first forward (connection.abandon())."
            )

    def check(self, session: Session, options: StepOptions) -> None:
        """See that the session may commit now.

        Raises:
            ProtocolError: A graph still lives, a backward broke off, or the round has other options, another learning rate
                perhaps.
        """
        self.check_whole(session)
        if session.graphs:
            raise ProtocolError(
                "A forward still waits for its backward: the weights it went through cannot be changed."
            )
        if self._rule == "turns" or not self._missing(but=session):
            self._make_way(session)
        others = [s.options for s in self.sessions.values() if s.deposit is not None]
        if self._rule == "mean" and others and others[0] != options:
            raise ProtocolError(
                f"This round's step has {others[0]}, not {options}: one step has one learning rate and one set of "
                "options. Give all data parties the same schedule."
            )

    def check_finite(self, session: Session, scale: float) -> None:
        """See that all gradients of the session are numbers: a step with others would ruin the weights for everybody.

        Raises:
            ProtocolError: They are not, or their norm is beyond what an optimizer can square.
        """
        self.show(session)
        if session.largest is None:
            session.largest = largest_of(norms_of(self.model)[1])
        if not session.largest * scale <= LARGEST_NORM:
            raise ProtocolError(
                "A gradient of this step is not a finite number, or larger than one can be, and no step is taken with it. Commit with skip=True; a "
                "GradScaler then uses a smaller scale."
            )

    def commit(
        self, session: Session, *, scale: float | None, options: StepOptions, skip: bool
    ) -> None:
        """Take the session's step, by the rule, when `check` allows it."""
        self.show(session)
        weights = list(self.model.parameters())
        if scale is not None and not skip:
            for weight in weights:
                if weight.grad is not None:
                    weight.grad.mul_(scale)
        if self._rule == "turns":
            if not skip:
                self._step(options)
        else:
            held = {p: p.grad for p in weights if p.grad is not None}
            session.deposit, session.options = {} if skip else held, options
            session.skipped, session.committed = skip, time.monotonic()
        self.clear(session)
        self._end_round()

    def await_round(self, session: Session) -> None:
        """See that `session` has not committed to a round that others have still to end.

        Raises:
            ProtocolError: It has.
        """
        if session.deposit is not None:
            now, missing = time.monotonic(), self._missing()
            silent = max((now - s.heard for s in missing), default=0)
            raise BusyError(
                f"This round waits for {len(missing)} other data parties (one {silent:.0f} s silent): the shared weights take one "
                "step with the mean of all gradients. Go on when all have committed. If one is gone, the model party's "
                "operator drops it, model_party.drop(session), or sets model_party.expiry."
            )

    def _make_way(self, session: Session, *, at_once: bool = False) -> None:
        """See that no forward of others waits for its backward, whose weights `session` will change.

        Who keeps one for too long loses it, and is told so when the backward comes.
        """
        now = time.monotonic()
        for other in self.sessions.values():
            if other is session:
                continue
            for number, graph in list(other.graphs.items()):
                if at_once or now - graph.made > session.caps.graph_seconds:
                    del other.graphs[number]
        if any(other.graphs for other in self.sessions.values() if other is not session):
            self._waiting, self._until = session, now + WAITING
            raise BusyError(
                "A forward of another data party still waits for its backward: the weights it went through cannot be changed. "
                "Commit again when it is done."
            )
        if self._waiting is session:
            self._waiting = None

    def await_turn(self, session: Session) -> None:
        """See that no other session waits to take a step, which forwards that begin now would hold up.

        Raises:
            BusyError: One does.
        """
        waiting = self._waiting
        if waiting is None or waiting is session or time.monotonic() > self._until:
            return
        if session.graphs:  # it is in the middle of a step, which must end first
            return
        if any(waiting is s for s in self.sessions.values()):
            raise BusyError(
                "Another data party is about to take a step on these weights. Send it again."
            )

    def late(self, seconds: float) -> list[Session]:
        """Who has not committed to a round that others have waited in for so long."""
        since = min(
            (s.committed for s in self.sessions.values() if s.deposit is not None), default=None
        )
        return self._missing() if since is not None and time.monotonic() - since > seconds else []

    def _missing(self, but: Session | None = None) -> list[Session]:
        sessions = self.sessions.values()
        return [s for s in sessions if s.trains and s.deposit is None and s is not but]

    def _end_round(self) -> None:
        joined = [s for s in self.sessions.values() if s.deposit is not None]
        if not joined or self._missing():
            return
        voters = [s for s in joined if not s.skipped]
        weights = list(self.model.parameters())
        shown = {p: p.grad for p in weights if p.grad is not None}
        for weight in weights:
            deposits = [s.deposit[weight] for s in voters if s.deposit and weight in s.deposit]
            weight.grad = torch.stack(deposits).sum(0) / len(voters) if deposits else None
        if voters and joined[0].options is not None:
            self._step(joined[0].options)
        for weight in weights:
            weight.grad = shown.get(weight)
        for session in joined:
            session.deposit, session.skipped = None, False

    def _step(self, options: StepOptions) -> None:
        if self.optimizer is None:
            return
        each = options.groups or [{"lr": options.rate} for _ in self.optimizer.param_groups]
        set_options(self.optimizer, each)
        self.optimizer.step()


def largest_of(norms: Tensor) -> float:
    """The largest of these norms; not a number if one is none."""
    return float(norms.max()) if norms.numel() else 0.0


def norms_of(model: nn.Module) -> tuple[list[str], Tensor]:
    """Names of the weights that have a gradient, and the norm of each."""
    named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    norms = [torch.linalg.vector_norm(gradient).cpu() for _, gradient in named]
    return [name for name, _ in named], torch.stack(norms) if norms else torch.tensor([])


def _without_rates(spec: Any) -> Any:
    """A spec as it is compared with another's: learning rates may differ, and are told with each step."""
    if isinstance(spec, Mapping):
        return {key: _without_rates(value) for key, value in spec.items() if key != "lr"}
    return [_without_rates(each) for each in spec] if isinstance(spec, (tuple, list)) else spec
