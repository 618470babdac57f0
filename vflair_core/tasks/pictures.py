"""Pictures with text: what a model's own processor makes of them, and where the text's tokens stand then."""

from __future__ import annotations

from typing import Any

import attrs

from vflair_core.errors import TaskError
from vflair_core.tasks.task import Example
from vflair_core.tasks.token_rows import TokenRow


def with_places(example: Example, processor: Any) -> Example:
    """Return `example` with one place for each picture in front of its text, unless the text has places.

    In a chat they are in front of what the user says last.

    Raises:
        TaskError: The processor has no token for pictures, or places and pictures differ in number.
    """
    token = getattr(processor, "image_token", None)
    if token is None:
        raise TaskError(
            f"{type(processor).__name__} has no image_token, so it cannot put pictures into text."
        )
    if token not in example.text:
        example = _placed(example, token * len(example.images))
    if example.text.count(token) != len(example.images):
        raise TaskError(
            f"{example.title} has {len(example.images)} pictures and "
            f"{example.text.count(token)} places {token!r} for them: write one place for each, or none at all."
        )
    return example


def _placed(example: Example, front: str) -> Example:
    chat, at = example.chat, 0
    if chat is not None:
        at = chat.said[-1][0]
        *before, (start, end) = chat.said
        opening = chat.opening[:at] + front + chat.opening[at:]
        said = (*before, (start + len(front), end + len(front)))
        chat = attrs.evolve(chat, opening=opening, said=said)
    spans = ((0, len(example.text)),) if example.private is None else example.private
    moved = tuple(
        (start + len(front) * (start >= at), end + len(front) * (end > at))
        for start, end in spans
        if start < end
    )
    text = example.text[:at] + front + example.text[at:]
    return attrs.evolve(example, text=text, private=moved, chat=chat)


def picture_row(processor: Any, example: Example, *, special: bool = True) -> TokenRow:
    """Return the tokens of an example with pictures that have their places, and its pixels.

    The processor puts as many tokens at a picture's place as the picture has parts; the tokenizer alone says
    where in the text the other tokens stand.

    Args:
        processor: Of the model.
        example: Made by `with_places`.
        special: Whether the tokenizer adds its special tokens.

    Raises:
        TaskError: The processor changes the text or says more of each token than its id.
    """
    token = processor.image_token
    text = example.text if example.pair is None else f"{example.text}\n{example.pair}"
    options = {} if special else {"add_special_tokens": False}
    made = dict(processor(images=list(example.images), text=text, return_tensors="pt", **options))
    ids: list[int] = made.pop("input_ids")[0].tolist()
    made.pop("attention_mask", None)
    for name, value in made.items():
        if tuple(value.shape) == (1, len(ids)):
            raise TaskError(
                f"{type(processor).__name__} says {name!r} of every token, which cannot follow an answer that is put "
                "after the prompt. Use a model whose processor gives pixels only, such as llava."
            )
    alone = processor.tokenizer(text, return_offsets_mapping=True, verbose=False, **options)
    place = processor.tokenizer.convert_tokens_to_ids(token)
    words = [
        (token, offset, sequence)
        for token, offset, sequence in zip(
            alone["input_ids"], alone["offset_mapping"], alone.sequence_ids(0), strict=True
        )
        if token != place
    ]
    if [word[0] for word in words] != [token for token in ids if token != place]:
        raise TaskError(
            f"{type(processor).__name__} changes more of the text than the places of pictures, so it is not "
            "known where private words stand."
        )
    known = iter(words)
    placed = [next(known) if token != place else (token, (0, 0), None) for token in ids]
    return TokenRow(
        example,
        ids,
        [0] * len(ids),
        [_in_own_text(offset, example) for _, offset, _ in placed],
        [_which(offset, sequence, example) for _, offset, sequence in placed],
        pixels=made,
    )


def _which(offset: tuple[int, int], sequence: int | None, example: Example) -> int | None:
    return None if sequence is None else int(_in_pair(offset, example))


def _in_pair(offset: tuple[int, int], example: Example) -> bool:
    return example.pair is not None and offset[0] > len(example.text)


def _in_own_text(offset: tuple[int, int], example: Example) -> tuple[int, int]:
    shift = len(example.text) + 1 if _in_pair(offset, example) else 0
    return offset[0] - shift, offset[1] - shift
