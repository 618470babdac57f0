"""What really was in the messages. Only the core's own process has it."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from attrs import field, frozen
from torch import Tensor

from vflair_core.tasks.preprocessor import Preprocessor
from vflair_core.tasks.task import Example
from vflair_core.tasks.token_rows import Tally, TokenRow


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


def truth_of(
    preprocessor: Preprocessor,
    examples: Sequence[Example],
    rows: Sequence[TokenRow],
    *,
    known: int = 0,
    members: Tensor | None = None,
) -> Truth:
    """Return what really was there, for grading only; it never leaves this process.

    Positions are those of the rows that were sent. `preprocessor` is made like theirs; its defenses are left out, so that
    the secrets are the original ones, as they would have been sent if no defense had changed the text: who blanks a name
    must not have it count as never there.
    """
    reading = attrs.evolve(preprocessor.reading, tally=Tally())  # these are not counted
    plain = attrs.evolve(preprocessor, reading=reading, defenses=None)
    untouched = [plain.batch([example], first_only=True).rows[0] for example in examples]
    labels = [example.label for example in examples]
    whole = all(isinstance(label, int) for label in labels)
    return Truth(
        [torch.tensor(row.ids) for row in rows],
        [torch.tensor(row.private) for row in rows],
        [_text(example) for example in examples],
        [_kept_secrets(row) for row in untouched],
        torch.tensor(labels) if whole else None,
        answers=[_answer(row) for row in rows],
        known=frozenset(range(known)),
        members=members,
        originals=_originals(rows, untouched),
    )


def _originals(rows: Sequence[TokenRow], untouched: Sequence[TokenRow]) -> list[Tensor]:
    """The private tokens before any defense changed the text; none if no text was changed."""
    if all(sent.ids == plain.ids for sent, plain in zip(rows, untouched, strict=True)):
        return []
    return [torch.tensor(row.ids)[torch.tensor(row.private)] for row in untouched]


def _answer(row: TokenRow) -> Tensor:
    """Which positions of a row hold the answer that it continues with and its end; none where nothing is answered."""
    return torch.tensor(row.learnt) & (row.start is not None)


def _text(example: Example) -> str:
    return example.text if example.pair is None else f"{example.text}\n{example.pair}"


def _kept_secrets(row: TokenRow) -> tuple[str, ...]:
    """The secrets that the row holds whole: nobody can recover what did not cross."""
    secrets = []
    texts = (row.example.text, row.example.pair or "")
    for sequence, spans in enumerate((row.example.private, row.example.private_pair)):
        offsets = [
            offset
            for offset, own in zip(row.offsets, row.sequences, strict=True)
            if own == sequence
        ]
        for left, right in spans or ():
            if _covers(offsets, left, right, texts[sequence]):
                secrets.append(texts[sequence][left:right])
    return tuple(secrets)


def _covers(offsets: Sequence[tuple[int, int]], left: int, right: int, text: str) -> bool:
    reached = left
    for start, end in sorted(offsets):
        if start <= reached or not text[reached:start].strip():  # tokenizers may leave spaces out
            reached = max(reached, end)
        if reached >= right:
            return True
    return False
