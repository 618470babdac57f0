"""What a task is: examples with their private spans, how they are shown, how answers are scored.

A task is a value. A plugin offers a function that returns one::

    def reviews(*, limit: int = 100) -> Task:
        return Task(name="reviews", kind="classification", labels=("bad", "good"), train=..., test=...)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attrs import field, frozen

from vflair_core.errors import TaskError, alternatives
from vflair_core.tasks.kinds import KINDS, TaskKind

Span = tuple[int, int]
EAGER = 4096  # rows of a list that are checked when the task is made; others when they are used


def _check_kind(_instance: object, _attribute: object, kind: str) -> None:
    if kind not in KINDS:
        raise TaskError(f"A task cannot be of kind {kind!r}.{alternatives(kind, KINDS)}")


def _check_private(_instance: object, _attribute: object, spans: tuple[Span, ...] | None) -> None:
    for start, end in spans or ():
        if not 0 <= start < end:
            raise TaskError(
                f"({start}, {end}) is not a span: give (first, last + 1) character positions "
                "with 0 <= first < last + 1."
            )


@frozen
class Chat:
    """What a chat template writes around the answer to an example whose `text` is the chat up to there.

    A row of both is then what the template writes and nothing else: the tokenizer adds no special tokens to it.
    :func:`~vflair_core.in_chat` makes one.

    Args:
        opening: Everything before the answer.
        ending: Everything after it: the end of its turn first.
        said: Spans of the chat that users and assistants said, in order: what a long row loses first.
        answers: Answers as the template writes them, where it takes space away.
        begin: What the template writes first and `Example.text` lacks: the begin token where the tokenizer puts one
            in front of other text by itself.
    """

    opening: str
    ending: str
    said: tuple[Span, ...] = ()
    answers: Mapping[str, str] = field(factory=dict)
    begin: str = ""


@frozen
class Example:
    """One row of a task, owned by the data party.

    Args:
        text: What the model reads first: a sentence, a question, a prompt. For ``causal-lm`` without an
            answer also what it learns to continue.
        label: Index into `Task.labels` (classification), a number (regression), or the index of the right
            one of `choices`.
        answer: The expected text, of a generation or of a question; None where nothing is generated.
        private: Character spans of `text` that are secret, which attacks are graded on; None means all.
        pair: What the model reads second: a hypothesis, or the passage that a question is about.
        private_pair: The same as `private`, of `pair`.
        span: Where in `pair` the answer stands, (first, last + 1) characters; None if it does not.
        answers: Every text that counts as right, if there is more than `answer`.
        choices: Possible answers to choose from; the one with the highest log-likelihood is the prediction.
        images: Pictures (PIL images) that stay with the data party.
        id: The row's own name in its source, for error messages and submissions.
        chat: Set where `text` is a chat that the tokenizer's template wrote (`in_chat`); it is rendered, not given.
    """

    text: str
    label: int | float | None = None
    answer: str | None = None
    private: tuple[Span, ...] | None = field(default=None, validator=_check_private)
    pair: str | None = None
    private_pair: tuple[Span, ...] | None = field(default=None, validator=_check_private)
    span: Span | None = None
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    images: tuple[Any, ...] = ()
    id: str = ""
    chat: Chat | None = None

    def __attrs_post_init__(self) -> None:
        if self.span is not None and not (
            self.pair is not None and 0 <= self.span[0] < self.span[1] <= len(self.pair)
        ):
            raise TaskError(
                f"{self.title}: its answer cannot stand at characters {self.span} of "
                f"a passage of {len(self.pair or '')} characters."
            )

    @property
    def identity(self) -> bytes:
        """What the example is known by, whatever defenses make of it: a digest of its texts and pictures, 32 bytes."""
        digest = hashlib.sha256(repr((self.text, self.pair, len(self.images))).encode())
        for image in self.images:
            digest.update(image.tobytes())
        return digest.digest()

    @property
    def title(self) -> str:
        """What errors call it: its id, else the beginning of its text."""
        return f"Example {self.id or self.text[:40]!r}"

    @property
    def secrets(self) -> tuple[str, ...]:
        """The private strings themselves; empty when the whole text is private."""
        secrets = tuple(self.text[start:end] for start, end in self.private or ())
        other = tuple((self.pair or "")[start:end] for start, end in self.private_pair or ())
        return secrets + other

    @property
    def accepted(self) -> tuple[str, ...]:
        """Every text that counts as a right answer."""
        return self.answers or (() if self.answer is None else (self.answer,))


Score = Callable[[Sequence[Any], Sequence[Example]], Mapping[str, float]]
Render = Callable[[Example, Any], Example]  # (example, tokenizer) -> what the model reads


@frozen
class TaskCard:
    """What can be said of a task without loading its data. A task function carries it as its attribute `card`.

    For example::

        reviews.card = TaskCard(kind="classification", metric="accuracy", sizes={"train": 800, "test": 200})

    Args:
        kind: As `Task.kind`.
        metric: Name of the main-task performance, the first one that is reported.
        source: Where the text comes from.
        licence: Of the text.
        columns: Columns of the source and what becomes of each, e.g. ``{"sentence": "text"}``.
        sizes: Rows of each split, ``{"train": …, "test": …}``, as far as they are known.
    """

    kind: TaskKind = field(validator=_check_kind)
    metric: str = ""
    source: str = ""
    licence: str = ""
    columns: Mapping[str, str] = field(factory=dict)
    sizes: Mapping[str, int] = field(factory=dict)


@frozen
class Task:
    """Examples to learn from and to be judged on, and how they are judged.

    Args:
        name: Its name.
        kind: What is learnt: ``causal-lm`` (all of the text, or `answer` after `text`), ``classification``,
            ``regression``, ``question-answering`` (a span of `pair`), ``seq2seq`` or ``image-text``.
        train: Examples to learn from: a list, or anything with a length and items by number, such as a view
            of a table on disk. Nothing here goes through all rows of it.
        test: Examples to be judged on, likewise; an evaluation reads each once.
        public: Text that anyone may see: for pretraining, for the calibration of defenses, for the attacker's
            auxiliary data. It must not overlap `train` and `test`.
        labels: Names of the classes.
        score: Turns predictions into metrics; the first one is the main-task performance MP, in [0, 1], higher
            is better. Predictions are label indices, numbers, indices of choices, generated texts, texts of
            spans (``""`` for none), or for ``causal-lm`` without answers the (T,) most likely next tokens. None
            takes the core's own metric for the kind.
        render: Puts an example into its prompt; private spans move along. None reads it as it is.
        generation: Options of transformers' `generate` for answers, e.g. ``{"max_new_tokens": 64}``.
        source: Where the text comes from.
        licence: Of the text.
        stride: Tokens that two windows over a passage share where it is too long for one
            (``question-answering``).
        no_answer: Whether a question may have no answer (``question-answering``); if not, some span always is one.
        facts: What else a result should say (corpus hash, rows dropped, …).
    """

    name: str
    kind: TaskKind = field(validator=_check_kind)
    train: Sequence[Example]
    test: Sequence[Example]
    public: Sequence[str] = ()
    labels: tuple[str, ...] = ()
    score: Score | None = None
    render: Render | None = None
    generation: Mapping[str, Any] = field(factory=dict)
    source: str = ""
    licence: str = ""
    stride: int = 0
    no_answer: bool = True
    facts: Mapping[str, Any] = field(factory=dict)

    def __attrs_post_init__(self) -> None:
        for split in ("train", "test"):
            rows: Sequence[Example] = getattr(self, split)
            if not len(rows):
                raise TaskError(f"Task {self.name!r} has no {split} example: give it at least one.")
            if isinstance(rows, (list, tuple)) and len(rows) <= EAGER:
                for row in range(len(rows)):
                    self.row(split, row)

    def row(self, split: str, number: int) -> Example:
        """Return one example of ``train`` or ``test`` after seeing that it has what its kind needs.

        Rows may be made when they are asked for, so this is where each is checked.

        Raises:
            TaskError: It lacks something; the message names split and row.
        """
        example: Example = getattr(self, split)[number]
        trouble = _trouble(example, self.kind, self.labels)
        if trouble:
            raise TaskError(f"Task {self.name!r}, {split} row {number}: {trouble}.")
        return example

    @property
    def answering(self) -> str:
        """How a language model is judged: it may ``choose``, ``write`` an answer or ``continue`` the text."""
        first = self.test[0]
        if first.choices:
            return "choose"
        return "write" if first.accepted else "continue"


def _trouble(example: Example, kind: str, labels: tuple[str, ...]) -> str:
    """Say what the example lacks, or nothing."""
    label = example.label
    whole = isinstance(label, int) and not isinstance(label, bool)
    if kind == "classification":
        if not whole or not 0 <= label < len(labels):  # type: ignore[operator]
            return f"label {label!r} is not an index into its {len(labels)} labels {labels!r}"
        return ""
    if kind == "regression":
        number = whole or isinstance(label, float)
        return "" if number and math.isfinite(label) else f"label {label!r} is not a number"  # type: ignore[arg-type]
    if example.choices:
        right = whole and 0 <= label < len(example.choices)  # type: ignore[operator]
        return "" if right else f"label {label!r} is not an index into its choices"
    if kind == "question-answering" and example.pair is None:
        return "there is no passage (pair) that the question is about"
    if kind in ("seq2seq", "image-text") and not example.accepted:
        return "there is neither an answer nor a choice to learn"
    return "there is no picture" if kind == "image-text" and not example.images else ""


SIDE = 64  # pixels of a blank picture


def public_examples(task: Task, count: int) -> list[Example]:
    """Return up to `count` examples made of the task's public text, to be read without its prompt.

    Labels are 0, answers the text itself, pictures blank; nothing should be learnt from them.
    """
    return [_standin(task.kind, text) for text in task.public[:count]]


def _standin(kind: str, text: str) -> Example:
    match kind:
        case "classification":
            return Example(text, label=0)
        case "regression":
            return Example(text, label=0.0)
        case "seq2seq":
            return Example(text, answer=text)
        case "image-text":
            return Example(text, answer=text, images=(_blank(),))
        case _:
            return Example(text)


def _blank() -> Any:
    import numpy as np

    return np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
