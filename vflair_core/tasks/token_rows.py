"""One row of tokens that remembers which characters of its example they came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs
from attrs import define, field, frozen
from torch import Tensor

from vflair_core.tasks.spans import private_tokens
from vflair_core.tasks.task import Example, Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOWHERE = (0, 0)


@define
class Tally:
    """What happened while examples were read.

    Attributes:
        examples: How many were read.
        truncated: How many lost tokens because they were longer than `max_length`.
    """

    examples: int = 0
    truncated: int = 0

    def count(self, rows: Sequence[TokenRow]) -> None:
        """Take note of the rows of one example."""
        self.examples += 1
        self.truncated += any(row.truncated for row in rows)


@frozen(eq=False)
class TokenRow:
    """One row of tokens, and what each of them is.

    Args:
        example: What was sent: after defenses and rendering.
        ids: Token ids (T,).
        types: 1 for tokens of the second text where the tokenizer says so, else 0.
        offsets: Characters of each token in its own text.
        sequences: 0 for tokens of `text`, 1 for tokens of `pair`, None for special ones, pictures and answers.
        target: Ids of the answer and of what ends it; in a row that continues they are also part of `ids`.
        start: Where in `ids` the target begins; None where it is no part of them.
        ending: How many of `target`, the last ones, end the answer and are no part of it.
        truncated: Tokens that did not fit.
        pixels: What the processor made of the pictures.
        number: Which it is of the examples that were read together.
        identity: Of the example as it was before any defense (`Example.identity`).
    """

    example: Example
    ids: list[int]
    types: list[int]
    offsets: list[Span]
    sequences: list[int | None]
    target: list[int] = field(factory=list)
    start: int | None = None
    ending: int = 0
    truncated: int = 0
    pixels: Mapping[str, Tensor] = field(factory=dict)
    number: int = 0
    identity: bytes = b""

    @property
    def private(self) -> list[bool]:
        """Which tokens are private: they touch a private span, and are no special ones."""
        return private_tokens(self.example, self.offsets, self.sequences)

    @property
    def learnt(self) -> list[bool]:
        """Of a row that continues: which tokens are the answer and its end; all where nothing is answered."""
        if self.start is None:
            return [True] * len(self.ids)
        after = len(self.ids) - self.start - len(self.target)
        return [False] * self.start + [True] * len(self.target) + [False] * after

    def without_end(self) -> TokenRow:
        """Return the row with what ends its answer no longer counted to it."""
        return attrs.evolve(self, target=self.target[: len(self.target) - self.ending], ending=0)


def window_target(row: TokenRow, start_of_row: int) -> tuple[int, int]:
    """Return first and last position of the answer in a window, or `start_of_row` twice if it is not all there."""
    span = row.example.span
    inside = [n for n, sequence in enumerate(row.sequences) if sequence == 1]
    if span is None or not inside:
        return start_of_row, start_of_row
    touched = [n for n in inside if row.offsets[n][0] < span[1] and span[0] < row.offsets[n][1]]
    reaches = row.offsets[inside[0]][0] <= span[0] and span[1] <= row.offsets[inside[-1]][1]
    return (touched[0], touched[-1]) if touched and reaches else (start_of_row, start_of_row)


def token_rows(
    tokenizer: PreTrainedTokenizerBase, text: str, pair: str | None, **options: Any
) -> list[TokenRow]:
    """Tokenise without saying of which example; several rows only if `options` ask for windows.

    A tokenizer that is not fast says of no token where in the text it stands.
    """
    encoded: Any = tokenizer(text, pair, return_token_type_ids=True, **options)
    example = Example(text, pair=pair)
    if tokenizer.is_fast:
        return [
            TokenRow(example, e.ids, e.type_ids, e.offsets, e.sequence_ids)
            for e in encoded.encodings
        ]
    ids = list(encoded["input_ids"])
    nowhere: list[Span] = [NOWHERE] * len(ids)
    return [TokenRow(example, ids, list(encoded["token_type_ids"]), nowhere, [None] * len(ids))]
