"""How a model reads examples: each becomes rows of tokens that remember where in the text they stand.

One example is one row; a passage that is too long for one is read in several windows, each a row.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import attrs
from attrs import field, frozen

from vflair_core.errors import TaskError
from vflair_core.tasks.chat import with_begin
from vflair_core.tasks.continuation import continued
from vflair_core.tasks.kinds import TaskKind
from vflair_core.tasks.task import Example, Render, Task
from vflair_core.tasks.token_rows import Tally, TokenRow, token_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@frozen(eq=False)
class InputFormat:
    """How a model reads the examples of a task.

    Args:
        kind: As `Task.kind`.
        render: As `Task.render`.
        stride: As `Task.stride`.
        two_stacks: The model has an encoder and a decoder.
        token_types: The model can be told which tokens belong to the second text.
        processor: Turns pictures and text into inputs, for ``image-text``.
        packing: Training puts several texts into one row.
        tally: Counts what is read.
        cuts_answers: Answers of two stacks that do not fit lose their end; else they are refused.
    """

    kind: TaskKind = "causal-lm"
    render: Render | None = None
    stride: int = 0
    two_stacks: bool = False
    token_types: bool = False
    processor: Any = None
    packing: bool = False
    tally: Tally = field(factory=Tally)
    cuts_answers: bool = False

    def of_public_text(self) -> InputFormat:
        """Return how public text is read: in no prompt, counted as nobody's, with as much of its stand-in answer as fits."""
        return attrs.evolve(self, render=None, tally=Tally(), cuts_answers=True)

    @property
    def continues(self) -> bool:
        """Whether an answer follows its prompt in the same row."""
        return self.kind in ("causal-lm", "image-text") and not self.two_stacks


def input_format_of(
    task: Task, model: Any, *, processor: Any = None, packing: bool = False
) -> InputFormat:
    """Return how `model`, whole or a data party's, reads `task`."""
    takes = inspect.signature(type(model).forward).parameters
    return InputFormat(
        kind=task.kind,
        render=task.render,
        stride=task.stride,
        two_stacks=bool(model.config.is_encoder_decoder),
        token_types="token_type_ids" in takes,
        processor=processor,
        packing=packing,
    )


def tokenize(
    tokenizer: PreTrainedTokenizerBase, reading: InputFormat, example: Example, max_length: int
) -> list[TokenRow]:
    """Turn one example, as it is sent, into rows of at most `max_length` tokens.

    A prompt loses its first words, never its answer; a passage is read in windows; other text loses its end.

    Raises:
        TaskError: The answer or the question leaves no room for anything else.
    """
    example = with_begin(example)
    if reading.kind == "question-answering" and example.pair:
        rows = _windows(tokenizer, example, max_length, reading.stride)
    elif reading.continues and (example.answer is not None or reading.kind == "image-text"):
        rows = [continued(tokenizer, example, max_length, processor=_processor(reading))]
    else:
        rows = [_row(tokenizer, example, max_length)]
        if reading.kind == "seq2seq" and example.answer is not None:
            target = _target(tokenizer, example.answer, max_length, cut=reading.cuts_answers)
            ending = int(target[-1:] == [tokenizer.eos_token_id])
            rows = [attrs.evolve(rows[0], target=target, ending=ending)]
    reading.tally.count(rows)
    return rows


def tokenize_prompt(
    tokenizer: PreTrainedTokenizerBase, reading: InputFormat, example: Example, max_length: int
) -> TokenRow:
    """Turn one example into the row that its answer is generated from."""
    bare = attrs.evolve(with_begin(example), answer=None)
    if not reading.continues:
        return _row(tokenizer, bare, max_length)
    return continued(tokenizer, bare, max_length, processor=_processor(reading))


def _processor(reading: InputFormat) -> Any:
    return reading.processor if reading.kind == "image-text" else None


def _row(tokenizer: PreTrainedTokenizerBase, example: Example, max_length: int) -> TokenRow:
    options: dict[str, Any] = {"add_special_tokens": example.chat is None}
    (whole,) = token_rows(tokenizer, example.text, example.pair, verbose=False, **options)
    if len(whole.ids) <= max_length:
        return attrs.evolve(whole, example=example)
    options |= {"truncation": True, "max_length": max_length}
    (short,) = token_rows(tokenizer, example.text, example.pair, **options)
    return attrs.evolve(short, example=example, truncated=len(whole.ids) - len(short.ids))


def _windows(
    tokenizer: PreTrainedTokenizerBase, example: Example, max_length: int, stride: int
) -> list[TokenRow]:
    """Read the passage in windows of `max_length` tokens, each after the whole question."""
    question = tokenizer(example.text, add_special_tokens=False, verbose=False)["input_ids"]
    taken = len(question) + tokenizer.num_special_tokens_to_add(pair=True)
    room = max_length - taken
    if room <= stride:
        raise TaskError(
            f"{example.title}: of max_length = {max_length} tokens its question "
            f"leaves {room} for the passage, and windows share {stride}. Set train.max_length to "
            f"{taken + stride + 1} or more, or a smaller stride."
        )
    if not tokenizer.is_fast:
        raise TaskError(
            "Question answering needs a fast tokenizer, which knows where in the text a token stands."
        )
    rows = token_rows(
        tokenizer,
        example.text,
        example.pair,
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
    )
    return [attrs.evolve(row, example=example) for row in rows]


def _target(
    tokenizer: PreTrainedTokenizerBase, answer: str, max_length: int, *, cut: bool
) -> list[int]:
    ids: list[int] = tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"]
    ending = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    target = [*ids, *ending]
    if cut and len(target) > max_length:
        return [*ids[: max_length - len(ending)], *ending]
    if len(target) > max_length:
        raise TaskError(
            f"The answer {answer[:40]!r} has {len(target)} tokens and max_length is {max_length}: set "
            "train.max_length higher, or drop the example."
        )
    return target
