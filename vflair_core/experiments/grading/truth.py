"""What really was in the messages. Only the core's own process has it."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from attrs import field, frozen
from torch import Tensor


@frozen(eq=False)
class Truth:
    """What really was there. It stays in the core's process.

    Args:
        tokens: Token ids of each victim, N times (T,).
        private: Which of them are private, N times (T,), bool.
        texts: The victims as text.
        secrets: Their planted strings.
        labels: Their classes (N,), if they have any.
        answers: Which tokens are an answer that the model learns, N times (T,), bool; none in bare texts.
        known: Victims whose labels the attacker was told; they are not graded.
        members: For each membership candidate (M,) the victim it is, or -1.
        originals: The private tokens that would have been sent if no defense had changed the text, N times (K,);
            none if what was sent is what there was.
        update_batch: How many victims share an update, where a guess was made from updates: within those its rows
            are in no order. 1 where each row is one victim's.
        places: Where in the rows that were sent `tokens` stand, N times (T,), bool, if they are not all of them: of a
            guess only these places are looked at, and others are compared from their first token on.
    """

    tokens: list[Tensor]  # N times (T,)
    private: list[Tensor]  # N times (T,), bool
    texts: list[str] = field(factory=list)
    secrets: list[tuple[str, ...]] = field(factory=list)
    labels: Tensor | None = None
    answers: list[Tensor] = field(factory=list)
    known: frozenset[int] = frozenset()
    members: Tensor | None = None
    originals: list[Tensor] = field(factory=list)  # N times (K,)
    update_batch: int = 1
    places: list[Tensor] = field(factory=list)

    @property
    def has_responses(self) -> bool:
        """Whether any victim has an answer among its tokens."""
        return any(bool(there.any()) for there in self.answers)

    def of_responses(self) -> Truth:
        """The truth about the answers alone, each from its first token on; no defense changes their text."""
        pairs = zip(self.tokens, self.answers, strict=True)
        tokens = [row[there] for row, there in pairs]
        return attrs.evolve(
            self,
            tokens=tokens,
            private=[torch.ones_like(row, dtype=torch.bool) for row in tokens],
            answers=[],
            originals=[],
            secrets=[],
            places=self.answers,
        )

    def of(self, rows: Sequence[int]) -> Truth:
        """The truth about some victims, in the order of `rows`; candidates stay as they are."""
        return Truth(
            [self.tokens[n] for n in rows],
            [self.private[n] for n in rows],
            [self.texts[n] for n in rows] if self.texts else [],
            [self.secrets[n] for n in rows] if self.secrets else [],
            None if self.labels is None else self.labels[list(rows)],
            [self.answers[n] for n in rows] if self.answers else [],
            frozenset(at for at, n in enumerate(rows) if n in self.known),
            self.members,
            [self.originals[n] for n in rows] if self.originals else [],
            self.update_batch,
            [self.places[n] for n in rows] if self.places else [],
        )
