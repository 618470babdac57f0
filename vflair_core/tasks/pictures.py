"""Pictures with text: what a model's own processor makes of them, and where the text's tokens stand then."""

from __future__ import annotations

from typing import Any

import attrs

from vflair_core.errors import TaskError
from vflair_core.tasks.task import Example
from vflair_core.tasks.token_rows import TokenRow


def with_places(example: Example, token: str) -> Example:
    """Return `example` with one place for each picture in front of its text, unless the text has places."""
    if token in example.text:
        return example
    front = token * len(example.images)
    spans = ((0, len(example.text)),) if example.private is None else example.private
    moved = tuple((start + len(front), end + len(front)) for start, end in spans if start < end)
    return attrs.evolve(example, text=front + example.text, private=moved)


def picture_row(processor: Any, example: Example) -> TokenRow:
    """Return the prompt of an example with pictures, and its pixels.

    The processor puts as many tokens at a picture's place as the picture has parts; the tokenizer alone says
    where in the text the other tokens stand.

    Raises:
        TaskError: The processor has no token for pictures, changes the text or says more of each token than its id,
            or places and pictures differ in number.
    """
    token = getattr(processor, "image_token", None)
    if token is None:
        raise TaskError(
            f"{type(processor).__name__} has no image_token, so it cannot put pictures into text."
        )
    example = with_places(example, token)
    if example.text.count(token) != len(example.images):
        raise TaskError(
            f"{example.title} has {len(example.images)} pictures and "
            f"{example.text.count(token)} places {token!r} for them: write one place for each, or none at all."
        )
    text = example.text if example.pair is None else f"{example.text}\n{example.pair}"
    made = dict(processor(images=list(example.images), text=text, return_tensors="pt"))
    ids: list[int] = made.pop("input_ids")[0].tolist()
    made.pop("attention_mask", None)
    for name, value in made.items():
        if tuple(value.shape) == (1, len(ids)):
            raise TaskError(
                f"{type(processor).__name__} says {name!r} of every token, which cannot follow an answer that is put "
                "after the prompt. Use a model whose processor gives pixels only, such as llava."
            )
    alone = processor.tokenizer(text, return_offsets_mapping=True, verbose=False)
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
    return None if sequence is None else int(offset[0] > len(example.text))


def _in_own_text(offset: tuple[int, int], example: Example) -> tuple[int, int]:
    shift = len(example.text) + 1 if offset[0] > len(example.text) else 0
    return offset[0] - shift, offset[1] - shift
