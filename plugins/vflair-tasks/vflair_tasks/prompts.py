"""Prompts: templates with `{column}` names, examples shown first, and the tokenizer's chat template.

What comes from the example stays private in its prompt, and nothing else does: neither the words of the template nor the
examples that are shown first, which are train examples that every prompt repeats.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Mapping, Sequence
from string import Formatter
from typing import Any

from attrs import evolve, field, frozen

from vflair_core import Example, TaskError, alternatives, in_chat

Span = tuple[int, int]


@frozen
class Prompt:
    r"""Show an example in a template.

    Args:
        template: Text with fields in braces, doubled where a brace is meant: ``"Q: {text}\nA:"``.
        names: What each field is: ``text`` or ``pair``.
        alone: Template of examples without a `pair`; None takes `template`.
        shots: Examples that are shown first, with their answers; of train, and of nobody that is attacked.
        between: What separates an answer that is shown from the next example.
        chat: Whether to write each example as a turn of the tokenizer's chat template.
        system: What the chat says first.

    Raises:
        TaskError: The template has a field that nothing can fill.
    """

    template: str
    names: Mapping[str, str] = field(factory=lambda: {"text": "text", "pair": "pair"})
    alone: str | None = None
    shots: tuple[Example, ...] = ()
    between: str = "\n\n"
    chat: bool = False
    system: str = ""

    def __attrs_post_init__(self) -> None:
        for template in (self.template, self.alone):
            check_fields(template or "", self.names)

    def __call__(self, example: Example, tokenizer: Any) -> Example:
        """Return the example as the model reads it: all in `text`, private where it came from the example.

        Raises:
            TaskError: The tokenizer has no chat template, or one that changes what it is given.
        """
        shown = self._filled(example)
        if self.chat:
            turns = [(self._filled(shot).text, answer_of(shot)) for shot in self.shots]
            return in_chat(shown, turns, tokenizer, system=self.system)
        before = "".join(
            with_answer(self._filled(shot).text, answer_of(shot)) + self.between
            for shot in self.shots
        )
        return moved(shown, before, "")

    def _filled(self, example: Example) -> Example:
        bare = example.pair is None and self.alone is not None
        return fill(str(self.alone) if bare else self.template, example, self.names)


def check_fields(template: str, names: Mapping[str, str]) -> None:
    """See that every field of the template has a name.

    Raises:
        TaskError: One has none, or the braces do not match.
    """
    try:
        fields = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise TaskError(
            f"The template {template!r} does not parse: {error}. Double a brace that is meant as such."
        ) from error
    for name in fields:
        if name not in names:
            raise TaskError(
                f"The template asks for {{{name}}}.{alternatives(name, names, label='There is')}"
            )


def fill(template: str, example: Example, names: Mapping[str, str]) -> Example:
    """Return the example with the filled template as `text`, no `pair`, and the private spans moved along."""
    text, private = "", []
    for words, name, _, _ in Formatter().parse(template):
        text += words
        if name is not None:
            value, spans = _part(example, names[name])
            private += [(len(text) + start, len(text) + end) for start, end in spans]
            text += value
    return evolve(
        example, text=text, pair=None, private=tuple(private), private_pair=None, span=None
    )


def _part(example: Example, name: str) -> tuple[str, tuple[Span, ...]]:
    value = example.text if name == "text" else example.pair or ""
    spans = example.private if name == "text" else example.private_pair
    if spans is None:
        spans = ((0, len(value)),) if value else ()
    return value, spans


def moved(example: Example, before: str, after: str) -> Example:
    """Return the example between two texts that are not private."""
    spans = example.private
    if spans is None:
        spans = ((0, len(example.text)),) if example.text else ()
    shift = len(before)
    return evolve(
        example,
        text=before + example.text + after,
        private=tuple((start + shift, end + shift) for start, end in spans),
    )


def answer_of(example: Example) -> str:
    """Return the expected text of an example: its answer, or the right one of its choices."""
    if example.answer is None and example.choices:
        return example.choices[int(example.label or 0)]
    return example.accepted[0] if example.accepted else ""


def with_answer(prompt: str, answer: str) -> str:
    """Return prompt and answer with one space between them, unless there is space already."""
    gap = "" if not prompt or prompt[-1].isspace() or answer[:1].isspace() else " "
    return prompt + gap + answer


def shots_from(
    train: Sequence[Example], count: int, *, seed: int
) -> tuple[tuple[Example, ...], Sequence[int]]:
    """Draw `count` train examples to show first; return them and the numbers of the others, to learn from.

    Raises:
        TaskError: There are not that many, with one left to learn from.
    """
    if not 0 <= count < len(train):
        raise TaskError(
            f"shots={count} of {len(train)} train examples: give 0 to {len(train) - 1}, so that one is left to learn from."
        )
    chosen = random.Random(f"shots {seed}").sample(range(len(train)), count)
    gone = set(chosen)
    rest = array("I", (number for number in range(len(train)) if number not in gone))
    return tuple(train[number] for number in chosen), rest


Render = Callable[[Example, Any], Example]
