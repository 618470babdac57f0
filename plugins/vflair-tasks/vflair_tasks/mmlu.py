"""MMLU: questions with four choices on 57 subjects. Question and choices are private; letters and template are not.

Hendrycks et al., "Measuring Massive Multitask Language Understanding", ICLR 2021, arXiv 2009.03300. The prediction is the letter
with the highest log-likelihood after the prompt of the paper, with up to five examples of the same subject from the
development set, which is neither learnt from nor tested on. Train is the auxiliary train set.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from vflair_core import Example, Task, TaskCard, TaskError, in_chat, takes_system
from vflair_tasks import metrics
from vflair_tasks.assembly import Choice, Side, assemble, open_sides, side_of
from vflair_tasks.checking import label_numbers
from vflair_tasks.offering import offer
from vflair_tasks.prompts import answer_of, check_fields, fill, moved, with_answer
from vflair_tasks.rows import Make, Rows
from vflair_tasks.tables import Original, Row, Source, open_split

LETTERS = ("A", "B", "C", "D")
COLUMNS = [("question",), ("choices",), ("answer",)]
NAMES = {"question": "text", "choices": "pair"}


@frozen
class Exam:
    """How the questions are put.

    Args:
        shots: Examples of the subject that are shown first, 0 to 5.
        prompt: Template of a question, with ``{question}`` and ``{choices}``.
        chat: Whether to use the tokenizer's chat template.
        train_split: ``auxiliary_train``, ``validation`` or ``dev``; with ``dev`` nothing is shown first.
    """

    shots: int = 5
    prompt: str = "{question}\n{choices}\nAnswer:"
    chat: bool = False
    train_split: str = "auxiliary_train"


def score(predictions: Sequence[int], examples: Sequence[Example]) -> dict[str, float]:
    """Return accuracy over all questions, and the mean of the accuracies of the subjects."""
    of_subject: dict[str, list[bool]] = {}
    for said, example in zip(predictions, examples, strict=True):
        of_subject.setdefault(subject_of(example), []).append(said == example.label)
    means = [sum(hits) / len(hits) for hits in of_subject.values()]
    return metrics.accuracy(predictions, examples) | {"subject_accuracy": sum(means) / len(means)}


def subject_of(example: Example) -> str:
    """Return the subject, which the row's name begins with; that of an auxiliary train row is empty."""
    return example.id.rpartition("/")[0]


@frozen
class Sheet:
    """Puts a question after the heading of its subject and the examples of it."""

    exam: Exam
    shown: Mapping[str, Sequence[Example]]

    def __call__(self, example: Example, tokenizer: Any) -> Example:
        """Return the example in its prompt."""
        subject = subject_of(example)
        about = f" about {subject.replace('_', ' ')}" if subject else ""
        heading = f"The following are multiple choice questions (with answers){about}."
        filled = fill(self.exam.prompt, example, NAMES)
        shots = [
            (fill(self.exam.prompt, shot, NAMES).text, answer_of(shot))
            for shot in self.shown.get(subject, ())[: self.exam.shots]
        ]
        if self.exam.chat:
            if takes_system(tokenizer):
                return in_chat(filled, shots, tokenizer, system=heading)
            # The first turn says it where nobody else may.
            if not shots:
                return in_chat(moved(filled, f"{heading}\n\n", ""), [], tokenizer)
            (question, letter), *others = shots
            return in_chat(filled, [(f"{heading}\n\n{question}", letter), *others], tokenizer)
        before = "".join(f"{with_answer(question, letter)}\n\n" for question, letter in shots)
        return moved(filled, f"{heading}\n\n{before}", "")


def _mmlu(choice: Choice, exam: Exam) -> Task:
    _check(exam)
    source = Source("cais/mmlu", "all", folders=("data",), original=Original(_files, _questions))
    sides = open_sides(
        source,
        choice,
        train=(exam.train_split, *(["val"] if exam.train_split == "validation" else [])),
        columns=COLUMNS,
    )
    shown: dict[str, list[Example]] = {}
    if exam.shots:
        opened = open_split(source, ("dev",), choice.data)
        dev = side_of("dev", opened, COLUMNS, where=f"{source.hub}, split dev")
        for example in Rows(dev.table, _maker(dev), dev.numbers):
            shown.setdefault(subject_of(example), []).append(example)
    return assemble(
        sides,
        _maker,
        choice,
        name="mmlu",
        kind="causal-lm",
        score=score,
        render=Sheet(exam, shown),
        source=source.hub,
        licence="MIT",
        facts={"shots_per_subject": exam.shots},
    )


def _check(exam: Exam) -> None:
    check_fields(exam.prompt, NAMES)
    if not 0 <= exam.shots <= 5:
        raise TaskError(
            f"shots={exam.shots}: the development set has 5 for each subject; give 0 to 5."
        )
    if exam.train_split not in ("auxiliary_train", "validation", "dev"):
        raise TaskError(
            f"train_split={exam.train_split!r} is unknown. Possible: auxiliary_train, validation, dev."
        )
    if exam.train_split == "dev" and exam.shots:
        raise TaskError("train_split='dev' learns from what is shown first. Set shots = 0.")


def _maker(side: Side) -> Make:
    index = label_numbers(side.table, side.columns[2], LETTERS, where=side.where)

    def make(row: Mapping[str, Any], number: int) -> Example:
        if len(row["choices"]) != len(LETTERS):
            raise TaskError(
                f"{side.where}, row {number} has {len(row['choices'])} choices; MMLU's have four."
            )
        text, private = "", []
        for letter, words in zip(LETTERS, row["choices"], strict=True):
            text += f"{chr(10) if text else ''}{letter}. "
            if words:
                private.append((len(text), len(text) + len(words)))
            text += words
        return Example(
            text=row["question"],
            pair=text,
            private_pair=tuple(private),
            label=index[row["answer"]],
            choices=LETTERS,
            id=f"{row.get('subject') or ''}/{number}",
        )

    return make


def _files(folder: Path, names: Sequence[str]) -> list[Path]:
    """Find ``test/anatomy_test.csv``."""
    return sorted(path for name in names for path in folder.glob(f"{name}/*.csv"))


def _questions(files: Sequence[str]) -> Iterator[Row]:
    """Read csv files without a header: question, four choices, letter."""
    for file in files:
        path = Path(file)
        subject, _, split = path.stem.rpartition("_")
        with path.open(encoding="utf-8", newline="") as stream:
            for number, row in enumerate(csv.reader(stream)):
                if len(row) != 6:
                    raise TaskError(
                        f"{path}, row {number} has {len(row)} columns and not 6: question, A, B, C, D, letter."
                    )
                yield {
                    "question": row[0],
                    "subject": subject if split in ("dev", "val", "test") else "",
                    "choices": row[1:5],
                    "answer": row[5],
                }


mmlu = offer(
    _mmlu,
    "mmlu",
    TaskCard(
        kind="causal-lm",
        metric="accuracy",
        source="cais/mmlu, all",
        licence="MIT",
        columns={"question": "text", "choices": "pair", "answer": "label"},
        sizes={"train": 99842, "test": 14042},
    ),
    "MMLU: choose one of four answers. Question and choices are private.",
    Choice,
    Exam,
    without=["test_share"],
)
