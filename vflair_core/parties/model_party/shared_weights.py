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
from vflair_core.errors import ProtocolError, alternatives
from vflair_core.parties.model_party.session import Session, StepOptions

Rule = Literal["turns", "mean"]


class SharedWeights:
    """The trainable state of `model`: its gradients by session, its one optimizer, its rule."""

    def __init__(self, model: nn.Module, sessions: dict[str, Session]) -> None:
        self.model, self.sessions = model, sessions
        self.optimizer: torch.optim.Optimizer | None = None
        self._rule: Rule = "turns"
        self._spec: dict[str, Any] = {}
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

    def join(self, session: Session, before: Session | None, spec: Mapping[str, Any]) -> None:
        """Let `session` train. It shares the optimizer of those who train already, or gets a fresh one.

        Raises:
            ProtocolError: Others train, with another optimizer than `spec` asks for.
        """
        others = [s for s in self.sessions.values() if s.trains and s is not before]
        wanted = _without_rates(spec)
        if not others:
            self.optimizer, self._spec = make_optimizer(self.model, spec), wanted
        elif wanted != self._spec:
            raise ProtocolError(
                f"Other data parties train these weights with {self._spec}, and one optimizer serves all. "
                f"{wanted} was asked for; use the same one, or wait until the others have closed."
            )
        session.trains = True

    def replace(self, before: Session, after: Session) -> None:
        """Hand the gradients of a session to the one that takes its place."""
        after.gradients = before.gradients
        if self._holder is before:
            self._holder = after

    def show(self, session: Session) -> None:
        """Let the weights hold the gradients of `session`, and put away those of whoever was there."""
        if self._holder is session:
            return
        weights = list(self.model.parameters())
        if self._holder is not None:
            self._holder.gradients = {p: p.grad for p in weights if p.grad is not None}
        if self._holder is not None or session.gradients:
            for weight in weights:
                weight.grad = session.gradients.get(weight)
        session.gradients, self._holder = {}, session

    def leave(self, name: str) -> None:
        """Forget a session and its gradients. A round that waited for it alone ends.

        Raises:
            ProtocolError: The round cannot end, because a graph still lives.
        """
        session = self.sessions[name]
        if self._would_end_round(session):
            self._refuse_live_graphs(but=session)
        if self._holder is session:
            self.clear(session)
            self._holder = None
        del self.sessions[name]
        self._end_round()

    def may_leave(self, name: str) -> bool:
        """Whether a session may be forgotten now: no round would end while a graph lives."""
        session = self.sessions[name]
        alive = any(s.graphs for s in self.sessions.values() if s is not session)
        return not (alive and self._would_end_round(session))

    def _would_end_round(self, without: Session) -> bool:
        others = [s for s in self.sessions.values() if s is not without]
        return any(s.deposit is not None for s in others) and not self._missing(but=without)

    def clear(self, session: Session) -> None:
        """Drop the gradients of `session`, as `zero_grad` does."""
        self.show(session)
        for weight in self.model.parameters():
            weight.grad = None

    def check(self, session: Session, options: StepOptions) -> None:
        """See that the session may commit now.

        Raises:
            ProtocolError: A graph still lives, or the round has other options, another learning rate perhaps.
        """
        if self._rule == "turns" or not self._missing(but=session):
            self._refuse_live_graphs()
        others = [s.options for s in self.sessions.values() if s.deposit is not None]
        if self._rule == "mean" and others and others[0] != options:
            raise ProtocolError(
                f"This round's step has {others[0]}, not {options}: one step has one learning rate and one set of "
                "options. Give all data parties the same schedule."
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
            session.skipped = skip
        self.clear(session)
        self._end_round()

    def await_round(self, session: Session) -> None:
        """See that `session` has not committed to a round that others have still to end.

        Raises:
            ProtocolError: It has.
        """
        if session.deposit is not None:
            now = time.monotonic()
            names = {id(s): name for name, s in self.sessions.items()}
            silent = [f"{names[id(s)]} ({now - s.heard:.0f} s silent)" for s in self._missing()]
            raise ProtocolError(
                f"This round waits for {len(silent)} other data parties, {', '.join(silent)}: the shared weights take one "
                "step with the mean of all gradients. Go on when all have committed. If one is gone, the model party's "
                "operator drops it, model_party.drop(session), or sets model_party.expiry."
            )

    def _refuse_live_graphs(self, but: Session | None = None) -> None:
        if any(session.graphs for session in self.sessions.values() if session is not but):
            raise ProtocolError(
                "A forward still waits for its backward: the weights it went through cannot be changed."
            )

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
