"""Every kind of task in one table: the class of transformers that does it, and what the core must know of it."""

from __future__ import annotations

from typing import Literal

from attrs import frozen

TaskKind = Literal[
    "causal-lm", "classification", "regression", "question-answering", "seq2seq", "image-text"
]


@frozen
class KindFacts:
    """What is known of a kind of task.

    Attributes:
        auto: Name of the auto class of transformers.
        pairs: Whether examples may have two texts that are read as such.
        labelled: Whether the model has an output for each label of the task.
        generates: Whether the model writes text.
    """

    auto: str
    pairs: bool = False
    labelled: bool = False
    generates: bool = False


KINDS: dict[TaskKind, KindFacts] = {
    "causal-lm": KindFacts("AutoModelForCausalLM", generates=True),
    "classification": KindFacts("AutoModelForSequenceClassification", pairs=True, labelled=True),
    "regression": KindFacts("AutoModelForSequenceClassification", pairs=True, labelled=True),
    "question-answering": KindFacts("AutoModelForQuestionAnswering", pairs=True),
    "seq2seq": KindFacts("AutoModelForSeq2SeqLM", generates=True),
    "image-text": KindFacts("AutoModelForImageTextToText", generates=True),
}
