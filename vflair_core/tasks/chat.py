"""Examples as the last turn of a chat, written by the tokenizer's own chat template and by nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import attrs

from vflair_core.errors import TaskError
from vflair_core.tasks.task import Chat, Example, Span

Said = tuple[str, str]  # (role, what it says)
_PRIVATE_USE = range(0xE000, 0xF900)  # signs of Unicode that no template writes


def in_chat(
    example: Example, turns: Sequence[tuple[str, str]], tokenizer: Any, *, system: str = ""
) -> Example:
    """Return the example as the last turn of a chat: its `text` is what the assistant's answer is generated from.

    `Example.chat` says what the template writes around the answer, so that a row of both is what
    ``tokenizer.apply_chat_template`` makes of the whole conversation, token for token.

    Args:
        example: Its `text` is what the user says; it has no `pair`.
        turns: What user and assistant said before.
        tokenizer: Whose chat template is used.
        system: What the chat says first.

    Raises:
        TaskError: The tokenizer has no chat template, or one that refuses the conversation or changes what is said.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise TaskError(
            "This tokenizer has no chat template. Take an instruction-tuned model, or set chat = false."
        )
    talk = [("system", system)] if system else []
    for question, reply in turns:
        talk += [("user", question), ("assistant", reply)]
    talk.append(("user", example.text))
    text = _written(tokenizer, talk, ask=True)
    spans = _places(tokenizer, talk, text)
    mark = next(_signs(talk))
    opening, _, ending = _written(tokenizer, [*talk, ("assistant", mark)]).partition(mark)
    start, end = spans[-1]
    if opening[:end] != text[:end]:
        raise _changes("what was said before, once there is an answer")
    chat = Chat(
        opening=opening,
        ending=ending,
        said=tuple(span for span, (role, _) in zip(spans, talk, strict=True) if role != "system"),
        answers={
            answer: _answer(tokenizer, talk, answer, opening, ending)
            for answer in _answers_of(example)
        },
    )
    return _without_begin(attrs.evolve(_moved(example, text, start, end), chat=chat), tokenizer)


def _without_begin(example: Example, tokenizer: Any) -> Example:
    """Leave out a begin token that the tokenizer would put in front again; `with_begin` puts it back."""
    begin = tokenizer.bos_token or ""
    adds = begin and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    if not adds or not example.text.startswith(begin):
        return example
    return _shifted(example, example.text.removeprefix(begin), begin, -len(begin))


def with_begin(example: Example) -> Example:
    """Return the example with all that the chat template wrote, as it is tokenised."""
    if example.chat is None or not example.chat.begin:
        return example
    begin = example.chat.begin
    return _shifted(example, begin + example.text, "", len(begin))


def _shifted(example: Example, text: str, begin: str, shift: int) -> Example:
    private = tuple((start + shift, end + shift) for start, end in example.private or ())
    chat = None if example.chat is None else attrs.evolve(example.chat, begin=begin)
    return attrs.evolve(example, text=text, private=private, chat=chat)


def takes_system(tokenizer: Any) -> bool:
    """Tell whether the chat template has a place for what the system says; some refuse it, some leave it out."""
    try:
        return "\ue000" in _written(tokenizer, [("system", "\ue000"), ("user", "?")])
    except TaskError:
        return False


def _written(tokenizer: Any, talk: Sequence[Said], *, ask: bool = False) -> str:
    from jinja2 import TemplateError

    messages = [{"role": role, "content": content} for role, content in talk]
    try:
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
        )
    except (TemplateError, TypeError, ValueError) as error:
        roles = ", ".join(role for role, _ in talk)
        raise TaskError(
            f"The chat template refuses a conversation of {roles}: {error}. Leave out what it does not know "
            "(system, shots), or set chat = false and write the template yourself."
        ) from error


def _signs(talk: Sequence[Said]) -> Iterator[str]:
    """Signs that nobody says."""
    said = set("".join(content for _, content in talk))
    return (chr(code) for code in _PRIVATE_USE if chr(code) not in said)


def _places(tokenizer: Any, talk: Sequence[Said], text: str) -> list[Span]:
    """Find where in `text` stands what each turn says, with the space around it that the template leaves."""
    signs = [chr(code) for code, _ in zip(_PRIVATE_USE, talk, strict=False)]
    marked = [(role, sign) for (role, _), sign in zip(talk, signs, strict=True)]
    rest, frame = _written(tokenizer, marked, ask=True), []
    for sign, (role, _) in zip(signs, talk, strict=True):
        before, found, rest = rest.partition(sign)
        if not found:
            raise TaskError(
                f"The chat template leaves out what the {role} says. Leave it out yourself, or set chat = false and "
                "write the template yourself."
            )
        frame.append(before)
    frame.append(rest)
    place, spans = 0, []
    for before, after, (role, content) in zip(frame, frame[1:], talk, strict=False):
        place += len(before)
        options = (content, content.strip(), content.lstrip(), content.rstrip())
        said = next((c for c in options if text.startswith(c + after, place)), None)
        if said is None:
            raise _changes(f"what the {role} says ({content[:40]!r})")
        spans.append((place, place + len(said)))
        place += len(said)
    if text[: len(frame[0])] != frame[0] or place + len(rest) != len(text):
        raise _changes("what is said")
    return spans


def _changes(what: str) -> TaskError:
    return TaskError(
        f"The chat template changes {what}, so it cannot be said what of the prompt is private and where an answer "
        "stands. Set chat = false and write the template yourself."
    )


def _answers_of(example: Example) -> tuple[str, ...]:
    """What may stand after the prompt: the answer to learn, or each choice."""
    if example.answer is not None:
        return (example.answer,)
    return example.choices or example.answers[:1]


def _answer(tokenizer: Any, talk: Sequence[Said], answer: str, opening: str, ending: str) -> str:
    """Return an answer as the template writes it."""
    whole = _written(tokenizer, [*talk, ("assistant", answer)])
    written = whole[len(opening) : len(whole) - len(ending)]
    if opening + written + ending != whole or written.strip() != answer.strip():
        raise _changes(f"what the assistant says ({answer[:40]!r})")
    return written


def _moved(example: Example, text: str, start: int, end: int) -> Example:
    """Put the example's text where it stands in the chat, its private spans with it; all else is public."""
    shift = start - example.text.index(
        text[start:end]
    )  # more than 0 apart where space was taken away
    private = ((0, len(example.text)),) if example.private is None else example.private
    moved = [(max(first + shift, start), min(last + shift, end)) for first, last in private]
    return attrs.evolve(
        example, text=text, private=tuple((first, last) for first, last in moved if first < last)
    )
