"""What an adaptive attacker may know of a defense: all but its randomness."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import Attribute, define, field
from torch import Tensor

from vflair_core.errors import DefenseError


class Mechanism:
    """What an adaptive attacker may know of a defense: all but its randomness.

    `expected` is the deterministic part (clip, mapping); `log_likelihood` scores an observation, up to a
    constant, given the undefended hidden state. `in_nats` says that it really is one: an attack then adds it
    to other log-likelihoods as it is, and otherwise estimates the scale of the noise. `sample` draws noise of the
    same kind, so that an attacker can train on what the defense would have sent; `sample_embeddings` does so for what
    the defense does to token embeddings, before the head.

    Hidden states are where the attacker's head computes, perhaps a GPU: what a mechanism holds follows them there. A
    `generator` is always the CPU's, so that its numbers are the same everywhere.
    """

    in_nats: bool = False

    def expected(self, hidden: Tensor) -> Tensor:  # (..., D) -> (..., D)
        """Return what would be sent for `hidden` if the noise were at its most likely value."""
        return hidden

    def log_likelihood(self, observed: Tensor, hidden: Tensor) -> Tensor:  # (..., D) -> (...)
        """Score `observed` given `hidden`; by default minus the squared distance to `expected`."""
        return -(observed - self.expected(hidden)).square().sum(-1)

    def sample(self, hidden: Tensor, generator: torch.Generator) -> Tensor:  # (..., D) -> (..., D)
        """Draw what could be sent for `hidden`, with fresh randomness; by default there is none."""
        return self.expected(hidden)

    def sample_embeddings(self, embeddings: Tensor, generator: torch.Generator) -> Tensor:
        """Draw what could go into the head for token embeddings (..., D); by default they go as they are."""
        return embeddings

    def inference(self) -> Mechanism:
        """Return the mechanism where nothing is trained; by default it is the same one."""
        return self


class Replacement:
    """What an adaptive attacker may know of a defense that replaces words: with which probability, by which.

    `words` are the V words that it knows. One that it does not know stays as it is, or nobody can say what it was.
    """

    words: Sequence[str] = ()

    def log_probabilities(self, numbers: Tensor) -> Tensor:  # (B,) -> (B, V)
        """Return, for words by their `numbers`, the log-probability that each of `words` is sent instead."""
        raise NotImplementedError


def _mechanisms(_: object, __: Attribute[list[Mechanism]], parts: list[Mechanism]) -> None:
    for part in parts:
        if not isinstance(part, Mechanism):
            raise DefenseError(
                f"A defense told of {type(part).__name__} as its mechanism, which is no vflair_core.Mechanism: an "
                f"attacker would ask it what it cannot answer. Derive {type(part).__name__} from Mechanism and "
                "override what the defense does, or return None where there is nothing to tell."
            )


@define
class ComposedMechanism(Mechanism):
    """Several mechanisms, one after the other; the last one's noise is the one that is seen.

    Raises:
        DefenseError: A part is no `Mechanism`.
    """

    parts: list[Mechanism] = field(validator=_mechanisms)

    def inference(self) -> ComposedMechanism:
        return ComposedMechanism([part.inference() for part in self.parts])

    @property
    def in_nats(self) -> bool:  # type: ignore[override]
        """Whether the noise that is seen has a likelihood."""
        return bool(self.parts) and self.parts[-1].in_nats

    def expected(self, hidden: Tensor) -> Tensor:
        for part in self.parts:
            hidden = part.expected(hidden)
        return hidden

    def log_likelihood(self, observed: Tensor, hidden: Tensor) -> Tensor:
        for part in self.parts[:-1]:
            hidden = part.expected(hidden)
        last = self.parts[-1] if self.parts else Mechanism()
        return last.log_likelihood(observed, hidden)

    def sample(self, hidden: Tensor, generator: torch.Generator) -> Tensor:
        for part in self.parts:
            hidden = part.sample(hidden, generator)
        return hidden

    def sample_embeddings(self, embeddings: Tensor, generator: torch.Generator) -> Tensor:
        for part in self.parts:
            embeddings = part.sample_embeddings(embeddings, generator)
        return embeddings
