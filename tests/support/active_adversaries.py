"""Active adversaries, as a plugin in one file: one that does nothing, and some that do what shows."""

from __future__ import annotations

import attrs
import torch
from attrs import define, field, frozen

from vflair_core import Adversary, Guess, hookimpl


@hookimpl
def vflair_attacks():
    return {
        "honest": Honest,
        "freezing": Freezing,
        "clumsy": Clumsy,
        "failing": Failing,
        "greedy": Greedy,
    }


@define
class Counting(Adversary):
    """Answers honestly and counts the backwards."""

    seen: int = 0

    def tamper(self, request, reply):
        self.seen += request.kind == "backward"
        return reply

    def state(self):
        return {"seen": torch.tensor([self.seen])}


@frozen
class Honest:
    """Guesses as many tokens of number 1 as it saw backwards."""

    def adversary(self) -> Counting:
        return Counting()

    def __call__(self, adversary_state, mask) -> Guess:
        return Guess(
            tokens=torch.where(mask, 1, -1), budget={"seen": float(adversary_state["seen"])}
        )


@define
class Zero(Adversary):
    """Sends gradients of zero, or of another shape."""

    shrink: int = 0

    def tamper(self, request, reply):
        if request.kind != "backward":
            return reply
        false = [
            attrs.evolve(c, tensor=torch.zeros_like(c.tensor[..., self.shrink :]))
            for c in reply.tensors
        ]
        return attrs.evolve(reply, tensors=tuple(false))


@frozen
class Freezing(Honest):
    """Leaves the head as it is."""

    def adversary(self) -> Zero:
        return Zero()

    def __call__(self, adversary_state, mask) -> Guess:
        return Guess(tokens=torch.where(mask, 1, -1))


@frozen
class Clumsy(Freezing):
    """Answers with too few numbers."""

    def adversary(self) -> Zero:
        return Zero(shrink=1)


class Raising(Adversary):
    """Breaks at the first message."""

    def tamper(self, request, reply):
        raise ZeroDivisionError(f"on {request.kind}")


@frozen
class Failing(Freezing):
    """Breaks."""

    text: str = field(default="")

    def adversary(self) -> Raising:
        return Raising()


@frozen
class Greedy(Freezing):
    """Wants the weights of later."""

    def adversary(self, current_head) -> Adversary:
        return Adversary()
