"""Examples to batches, through the defenses of text and tokens: the one way into a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import attrs
import torch
from attrs import field, frozen

from vflair_core.errors import TaskError
from vflair_core.tasks.collation import Batch, Encoded, collate, pack
from vflair_core.tasks.spans import changed, rendered
from vflair_core.tasks.task import Example
from vflair_core.tasks.token_rows import TokenRow
from vflair_core.tasks.tokenization import InputFormat, tokenize, tokenize_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextDefenses(Protocol):
    """What examples go through on their way into a model."""

    def fields(self, fields: dict[str, str]) -> dict[str, str]:
        """Change the texts of one example."""

    def tokens(self, batch: Batch) -> Batch:
        """Change the tokens of a batch."""

    def answer(self, prompt: str, answer: str) -> str:
        """Change an answer on its way back."""


@frozen(eq=False)
class Preprocessor:
    """Reads examples for one model: text defenses, then the rendering, then tokens, then token defenses.

    Args:
        tokenizer: The model's.
        reading: How the model reads the task.
        max_length: Tokens kept of each row.
        defenses: The data party's; None for an unsplit model.
        device: Where batches are put; None leaves them on the CPU.
    """

    tokenizer: PreTrainedTokenizerBase
    reading: InputFormat = field(factory=InputFormat)
    max_length: int = 512
    defenses: TextDefenses | None = None
    device: torch.device | None = None

    def shown(self, example: Example) -> Example:
        """Return what is sent of an example: its texts as defenses leave them, in its prompt."""
        if self.defenses is not None:
            fields = {"text": example.text}
            if example.pair is not None:
                fields["pair"] = example.pair
            fields = self.defenses.fields(fields)
            example = changed(example, fields["text"], fields.get("pair"))
        if self.reading.render is None:
            return example
        return rendered(example, self.reading.render(example, self.tokenizer))

    def batch(
        self, examples: Sequence[Example], *, pack_rows: bool = False, first_only: bool = False
    ) -> Encoded:
        """Return what the model learns from, or is judged on by its loss.

        Args:
            examples: Of the kind that is read.
            pack_rows: Put several texts into one row.
            first_only: Keep one row of each example: the first window of a passage.
        """
        rows: list[TokenRow] = []
        for number, example in enumerate(examples):
            shown = _right(self.shown(example))
            made = tokenize(self.tokenizer, self.reading, shown, self.max_length)
            kept = made[: 1 if first_only else None]
            rows += [attrs.evolve(row, number=number, identity=example.identity) for row in kept]
        if pack_rows:
            return self._through(pack(self.tokenizer, rows, self.max_length))
        return self.together(rows)

    def together(self, rows: Sequence[TokenRow]) -> Encoded:
        """Return a batch of rows that were read: no text defense draws for them again."""
        return self._through(Encoded(collate(self.tokenizer, self.reading, rows), list(rows)))

    def prompts(self, examples: Sequence[Example]) -> Encoded:
        """Return what answers are generated from; a model of one stack wants padding on the left."""
        rows = [
            attrs.evolve(
                tokenize_prompt(self.tokenizer, self.reading, self.shown(example), self.max_length),
                identity=example.identity,
            )
            for example in examples
        ]
        side = "right" if self.reading.two_stacks else "left"
        batch = collate(self.tokenizer, self.reading, rows, side=side, learn=False)  # type: ignore[arg-type]
        return self._through(Encoded(batch, rows))

    def choices(self, examples: Sequence[Example]) -> Encoded:
        """Return a row for each choice of each example: its prompt, then the choice; labels are the choice without its end."""
        rows = []
        for example in examples:
            shown = self.shown(example)
            tried = [
                tokenize(
                    self.tokenizer,
                    self.reading,
                    attrs.evolve(shown, answer=choice),
                    self.max_length,
                )[0]
                for choice in shown.choices
            ]
            rows += [attrs.evolve(row.without_end(), identity=example.identity) for row in tried]
        return self._through(Encoded(collate(self.tokenizer, self.reading, rows), rows))

    def _through(self, encoded: Encoded) -> Encoded:
        batch = encoded.batch
        if self.defenses is not None:
            batch = self.defenses.tokens(batch).marked()
        batch.owned_by(encoded.owners)
        return attrs.evolve(encoded, batch=batch if self.device is None else batch.to(self.device))


def _right(example: Example) -> Example:
    """The right one of several choices is the answer to learn; of several answers the first."""
    if example.answer is not None:
        return example
    if example.choices:
        if not isinstance(example.label, int):
            raise TaskError(f"{example.title} has choices and no label that says which is right.")
        return attrs.evolve(example, answer=example.choices[example.label])
    return attrs.evolve(example, answer=example.answers[0]) if example.answers else example
