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

    `text` is what the model reads (for ``causal-lm`` also what it learns to continue). `label` is the
    index into `Task.labels` for classification or a number for regression, `answer` the expected text
    of a generation task. `private` lists the character spans of `text` that are secret, which attacks
    are graded on; None means all of `text`.
    """

    text: str
    label: int | float | None = None
    answer: str | None = None
    private: tuple[Span, ...] | None = field(default=None, validator=_check_private)

    @property
    def secrets(self) -> tuple[str, ...]:
        """The private strings themselves; empty when the whole text is private."""
        return tuple(self.text[start:end] for start, end in self.private or ())


Score = Callable[[Sequence[Any], Sequence[Example]], Mapping[str, float]]


@frozen
class Task:
    """Examples to learn from and to be judged on, and how they are judged.

    `public` is text that anyone may see: it serves pretraining, calibration of defenses and the
    attacker's auxiliary data, and must not overlap `train` and `test`. `score` turns predictions (label
    indices, numbers, or for causal-lm the (T,) most likely next tokens of each row) into metrics; the first one is the main-task performance MP, in
    [0, 1] and higher is better. None takes the core's own metric for the kind. `facts` (corpus hash,
    rows dropped, …) goes into the result as it is.
    """

    name: str
    kind: Kind = field(validator=_check_kind)
    train: Sequence[Example]
    test: Sequence[Example]
    public: Sequence[str] = ()
    labels: tuple[str, ...] = ()
    score: Score | None = None
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
