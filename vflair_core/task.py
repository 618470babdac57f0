"""What a task is: examples with their private spans, how they are shown, how answers are scored.

A task is a value. A plugin offers a function that returns one::

    def reviews(*, limit: int = 100) -> Task:
        return Task(name="reviews", kind="classification", labels=("bad", "good"), train=..., test=...)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

from attrs import field, frozen

from vflair_core.errors import TaskError, did_you_mean

Kind = Literal[
    "causal-lm", "classification", "regression", "question-answering", "seq2seq", "image-text"
]
Span = tuple[int, int]


def _check_kind(_instance: object, _attribute: object, kind: str) -> None:
    if kind not in get_args(Kind):
        possible = ", ".join(get_args(Kind))
        hint = did_you_mean(kind, get_args(Kind))
        raise TaskError(f"A task cannot be of kind {kind!r}. Possible: {possible}.{hint}")


def _check_private(_instance: object, _attribute: object, spans: tuple[Span, ...] | None) -> None:
    for start, end in spans or ():
        if not 0 <= start < end:
            raise TaskError(
                f"({start}, {end}) is not a span: give (first, last + 1) character positions "
                "with 0 <= first < last + 1."
            )


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

    def __attrs_post_init__(self) -> None:
        if self.span is not None and not (
            self.pair is not None and 0 <= self.span[0] < self.span[1] <= len(self.pair)
        ):
            raise TaskError(
                f"Example {self.id or self.text[:40]!r}: its answer cannot stand at characters {self.span} of "
                f"a passage of {len(self.pair or '')} characters."
            )

    @property
    def secrets(self) -> tuple[str, ...]:
        """The private strings themselves; empty when the whole text is private."""
        own = tuple(self.text[start:end] for start, end in self.private or ())
        other = tuple((self.pair or "")[start:end] for start, end in self.private_pair or ())
        return own + other

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

    kind: Kind = field(validator=_check_kind)
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
        train: Examples to learn from.
        test: Examples to be judged on.
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
        facts: What else a result should say (corpus hash, rows dropped, …).
    """

    name: str
    kind: Kind = field(validator=_check_kind)
    train: Sequence[Example]
    test: Sequence[Example]
    public: Sequence[str] = ()
    labels: tuple[str, ...] = ()
    score: Score | None = None
    render: Render | None = None
    generation: Mapping[str, Any] = field(factory=dict)
    source: str = ""
    licence: str = ""
    facts: Mapping[str, Any] = field(factory=dict)

    def __attrs_post_init__(self) -> None:
        for split in ("train", "test"):
            if not len(getattr(self, split)):
                raise TaskError(f"Task {self.name!r} has no {split} example: give it at least one.")
        if self.kind == "classification":
            for split in ("train", "test"):
                for row, example in enumerate(getattr(self, split)):
                    if not isinstance(example.label, int) or not 0 <= example.label < len(
                        self.labels
                    ):
                        raise TaskError(
                            f"Task {self.name!r}, {split} row {row}: label {example.label!r} is not an "
                            f"index into its {len(self.labels)} labels {self.labels!r}."
                        )
