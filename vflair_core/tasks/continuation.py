"""A prompt and its answer in one row: written as one text, tokenised once, the answer found by its characters.

What a chat template wrote is tokenised as ``tokenizer.apply_chat_template`` does; to other text the tokenizer adds its own
special tokens, and its end token ends the answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
from attrs import frozen

from vflair_core.errors import TaskError
from vflair_core.tasks.pictures import picture_row, with_places
from vflair_core.tasks.task import Example
from vflair_core.tasks.token_rows import NOWHERE, TokenRow, token_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@frozen
class _Written:
    """A whole row as text: `last` is its text, or its pair where it has one.

    Attributes:
        last: With the answer and all that follows it.
        start: Where the answer begins, with the space or the words that lead to it.
        end: Where it ends.
    """

    last: str
    start: int
    end: int


def continued(
    tokenizer: PreTrainedTokenizerBase,
    example: Example,
    max_length: int,
    *,
    processor: Any = None,
) -> TokenRow:
    """Return the prompt, the answer and its end as one row; the prompt alone where the example has no answer.

    A row that is too long loses the first words of its prompt (of a chat: of what was said in it).

    Args:
        tokenizer: Of the model.
        example: As it is sent.
        max_length: Tokens of the row.
        processor: Puts pictures into the text.

    Raises:
        TaskError: The answer does not fit, or the tokenizer does not say where it stands.
    """
    if processor is not None:
        example = with_places(example, processor)
    written = _written(example)
    row = _tokenised(tokenizer, example, written.last, processor)
    if example.answer is None:
        return _cut(tokenizer, row, max_length)
    start = _start(tokenizer, row, written)
    end = _end(tokenizer, row, written, start)
    ids, stop = list(row.ids), _end_of_turn(tokenizer, row, end)
    if example.chat is None and tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
        stop = len(ids)
    answered = attrs.evolve(
        row,
        ids=ids,
        types=[*row.types, *(row.types[-1:] or [0])][: len(ids)],
        offsets=row.offsets[:start] + [NOWHERE] * (len(ids) - start),
        sequences=row.sequences[:start] + [None] * (len(ids) - start),
        target=ids[start:stop],
        start=start,
        ending=stop - end,
    )
    return _cut(tokenizer, answered, max_length)


def end_tokens(tokenizer: PreTrainedTokenizerBase, example: Example) -> set[int]:
    """Return the tokens that end an answer: the tokenizer's end token, and the end of turn of a chat."""
    ends = {tokenizer.eos_token_id} - {None}
    if example.chat is not None:
        (row,) = token_rows(tokenizer, example.chat.ending, None, add_special_tokens=False)
        ends |= set(row.ids[: _end_of_turn(tokenizer, row, 0)][-1:]) & _special(tokenizer)
    return ends


def answer_text(tokenizer: PreTrainedTokenizerBase, example: Example, ids: list[int]) -> str:
    """Return what generated tokens say, without special ones and without what a chat template writes before an answer.

    Args:
        tokenizer: Of the model.
        example: Of the row that was continued.
        ids: Up to what ends the answer.
    """
    text = str(tokenizer.decode(ids, skip_special_tokens=True))
    if example.chat is None or not example.chat.opening.startswith(example.text):
        return text
    before = example.chat.opening[len(example.text) :]
    (row,) = token_rows(tokenizer, before, None, add_special_tokens=False)
    lead = str(tokenizer.decode(row.ids, skip_special_tokens=True)).strip()
    return text.strip().removeprefix(lead) if lead else text


# -- the text --------------------------------------------------------------------------------------------------


def _written(example: Example) -> _Written:
    prompt = example.text if example.pair is None else example.pair
    answer = example.answer
    if answer is None:
        return _Written(prompt, len(prompt), len(prompt))
    if example.chat is None:
        gap = "" if not (prompt and answer) or prompt[-1].isspace() or answer[0].isspace() else " "
        whole = prompt + gap + answer
        return _Written(whole, len(prompt), len(whole))
    chat = example.chat
    answer = chat.answers.get(answer, answer)
    start = len(prompt) if chat.opening.startswith(prompt) else len(chat.opening)
    end = len(chat.opening) + len(answer)
    return _Written(chat.opening + answer + chat.ending, start, end)


# -- its tokens ------------------------------------------------------------------------------------------------


def _tokenised(
    tokenizer: PreTrainedTokenizerBase, example: Example, last: str, processor: Any
) -> TokenRow:
    """All tokens of the row but an end token that the tokenizer puts by itself."""
    if example.pair is None:
        whole = attrs.evolve(example, text=last)
    else:
        whole = attrs.evolve(example, pair=last)
    special = example.chat is None
    if processor is not None:
        row = picture_row(processor, whole, special=special)
    else:
        options = {"add_special_tokens": special, "verbose": False}
        (row,) = token_rows(tokenizer, whole.text, whole.pair, **options)
    row = attrs.evolve(row, example=example)
    ends = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None, tokenizer.bos_token_id}
    if not special or not row.ids or row.ids[-1] not in ends or row.sequences[-1] is not None:
        return row
    return attrs.evolve(
        row,
        ids=row.ids[:-1],
        types=row.types[:-1],
        offsets=row.offsets[:-1],
        sequences=row.sequences[:-1],
    )


def _start(tokenizer: PreTrainedTokenizerBase, row: TokenRow, written: _Written) -> int:
    """Return the first token that is not all of the prompt: one that holds both is learnt."""
    own = 0 if row.example.pair is None else 1
    if not tokenizer.is_fast:
        return _shared(tokenizer, row, written, written.start)
    reach = (n for n, which in enumerate(row.sequences) if which == own)
    return next((n for n in reach if row.offsets[n][1] > written.start), len(row.ids))


def _end(tokenizer: PreTrainedTokenizerBase, row: TokenRow, written: _Written, start: int) -> int:
    """Return the first token behind the answer that holds nothing of it."""
    if written.end == len(written.last):
        return len(row.ids)
    if not tokenizer.is_fast:
        return _shared(tokenizer, row, written, written.end)
    behind = (n for n in range(start, len(row.ids)) if row.offsets[n][0] >= written.end)
    return next(behind, len(row.ids))


def _shared(
    tokenizer: PreTrainedTokenizerBase, row: TokenRow, written: _Written, place: int
) -> int:
    """Count the tokens that are the same if the text ends at a place, where no token says where it stands."""
    before = _tokenised(tokenizer, row.example, written.last[:place], None).ids
    pairs = enumerate(zip(before, row.ids, strict=False))
    same = next((n for n, (a, b) in pairs if a != b), min(len(before), len(row.ids)))
    if (
        same < len(before) - 1
    ):  # one token may hold the end of the prompt and the start of the answer
        raise TaskError(
            f"{row.example.title}: {type(tokenizer).__name__} does not say where in a text its tokens stand, and "
            "writes the prompt otherwise where an answer follows. Use a fast tokenizer for this model."
        )
    return same


def _special(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of the tokens that are no words: special ones, and those that were added for a template."""
    return set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, row: TokenRow, end: int) -> int:
    """Return the position behind the first special token after the answer; behind the last token if none is special."""
    special = _special(tokenizer)
    behind = (n + 1 for n in range(end, len(row.ids)) if row.ids[n] in special)
    return next(behind, len(row.ids))


# -- a row that is too long ------------------------------------------------------------------------------------


def _cut(tokenizer: PreTrainedTokenizerBase, row: TokenRow, max_length: int) -> TokenRow:
    """Take the first words away that may go, as many as are too many."""
    prompt = len(row.ids) if row.start is None else row.start
    surplus = len(row.ids) - max_length
    if surplus <= 0:
        return row
    free = [n for n in range(prompt) if _may_go(tokenizer, row, n)]
    if surplus > len(free):
        raise TaskError(
            f"{row.example.title}: of max_length = {max_length} tokens its answer needs "
            f"{len(row.ids) - prompt} and {prompt - len(free)} are special, stand for pictures or are written by the "
            f"chat template. Set train.max_length higher, to {len(row.ids) - len(free)} or more, or drop the example."
        )
    dropped = set(free[:surplus])
    rest = [n for n in range(len(row.ids)) if n not in dropped]
    return attrs.evolve(
        row,
        ids=[row.ids[n] for n in rest],
        types=[row.types[n] for n in rest],
        offsets=[row.offsets[n] for n in rest],
        sequences=[row.sequences[n] for n in rest],
        start=None if row.start is None else row.start - surplus,
        truncated=surplus,
    )


def _may_go(tokenizer: PreTrainedTokenizerBase, row: TokenRow, number: int) -> bool:
    if not tokenizer.is_fast:
        return row.ids[number] not in tokenizer.all_special_ids
    if row.sequences[number] is None:
        return False
    if row.example.chat is None:
        return True
    first, last = row.offsets[number]
    return any(first < right and left < last for left, right in row.example.chat.said)
