"""SQuAD 1.1 and 2.0: the span of a passage that answers a question. Question and passage are private in full.

Rajpurkar et al., EMNLP 2016, arXiv 1606.05250, and ACL 2018, arXiv 1806.03822. Tests are the development sets. The score is
the official one, on the texts of answers: exact match and F1 of words without case, punctuation and articles, the best over
all annotators; in 2.0 a question without an answer is right if nothing is answered.
Differs from the official one: a text of which that leaves nothing ("A", "?") is compared as it is written, so that no answer
is never the same as an answer.
"""

from __future__ import annotations

import functools
import json
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vflair_core import Example, Task, TaskCard, TaskError
from vflair_tasks.assembly import Choice, Side, assemble, open_sides
from vflair_tasks.metrics import shared_words
from vflair_tasks.offering import offer
from vflair_tasks.rows import Make
from vflair_tasks.tables import Original, Row, Source

LICENCE = "CC-BY-SA-4.0"
STRIDE = 128  # tokens that two windows share, as published with BERT


def score(predictions: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
    """Return F1 and exact match; where some questions have no answer, also of both sorts of questions."""
    found: list[tuple[bool, float, float]] = []  # (has an answer, F1, exact match)
    for said, example in zip(predictions, examples, strict=True):
        accepted = [answer for answer in example.accepted if answer] or [""]
        f1 = max(shared_words(plain_words(said), plain_words(answer)) for answer in accepted)
        exact = float(any(plain_words(said) == plain_words(answer) for answer in accepted))
        found.append((accepted != [""], f1, exact))
    with_answer = [row for row in found if row[0]]
    without = [row for row in found if not row[0]]
    metrics = {"f1": _mean(found, 1), "exact_match": _mean(found, 2)}
    if without:
        metrics["exact_match_unanswerable"] = _mean(without, 2)
        if with_answer:
            metrics["f1_answerable"] = _mean(with_answer, 1)
    return metrics


def plain_words(text: str) -> list[str]:
    """Return the words in lower case without punctuation and articles; those of the text itself if none is left."""
    letters = "".join(sign for sign in text.lower() if sign not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", letters).split() or text.split()


def _mean(rows: Sequence[tuple[bool, float, float]], column: int) -> float:
    return sum(row[column] for row in rows) / len(rows)


def _files(folder: Path, names: Sequence[str]) -> list[Path]:
    """Find ``train-v1.1.json``, but no table of that name."""
    if folder.is_file():
        return []
    found = sorted(path for name in names for path in folder.glob(f"{name}-v*.json"))
    return found[:1]


def _questions(files: Sequence[str]) -> Iterator[Row]:
    for file in files:
        for article in json.loads(Path(file).read_text(encoding="utf-8"))["data"]:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    answers = question["answers"]
                    yield {
                        "id": question["id"],
                        "question": question["question"],
                        "context": paragraph["context"],
                        "answers": {
                            "text": [answer["text"] for answer in answers],
                            "answer_start": [answer["answer_start"] for answer in answers],
                        },
                    }


def squad(version: str, choice: Choice) -> Task:
    """Return SQuAD of version 1.1 or 2.0."""
    two = version == "2.0"
    folders = (f"v{version}", f"SQuAD{version}", "squad_v2" if two else "squad", "plain_text")
    source = Source(
        "rajpurkar/squad_v2" if two else "rajpurkar/squad",
        folders=folders,
        original=Original(_files, _questions),
    )
    return assemble(
        open_sides(
            source,
            choice,
            test=("validation", "dev"),
            columns=[("question",), ("context",), ("answers",)],
        ),
        functools.partial(_maker, answerable=not two),
        choice,
        name="squad2" if two else "squad",
        kind="question-answering",
        score=score,
        stride=STRIDE,
        no_answer=two,
        source=source.hub,
        licence=LICENCE,
    )


def _maker(side: Side, *, answerable: bool) -> Make:
    question, context, answers = side.columns

    def make(row: Mapping[str, Any], number: int) -> Example:
        name = str(row.get("id") or f"{side.name}-{number}")
        starts, texts = row[answers]["answer_start"], row[answers]["text"]
        if answerable and not texts:
            raise TaskError(
                f"{side.where}, row {number} ({name}) has no answer, and SQuAD 1.1 has one to each question. "
                "Take the task squad2, or drop the row."
            )
        return Example(
            text=row[question],
            pair=row[context],
            span=answer_span(row[context], texts[0], starts[0], f"{side.where}, row {number}")
            if texts
            else None,
            answer=texts[0] if texts else "",
            answers=tuple(dict.fromkeys(texts)),
            id=name,
        )

    return make


def answer_span(passage: str, answer: str, start: int, where: str) -> tuple[int, int]:
    """Return the characters of an answer.

    Raises:
        TaskError: It does not stand where it is said to.
    """
    end = start + len(answer)
    if not answer or passage[start:end] != answer:
        raise TaskError(
            f"{where}: the answer {answer!r} does not stand at character {start} of its passage "
            f"(there is {passage[start:end]!r}). Correct answer_start, or drop the row."
        )
    return start, end


def _offer(version: str, name: str, sizes: tuple[int, int], about: str) -> Any:
    card = TaskCard(
        kind="question-answering",
        metric="f1",
        source="rajpurkar/squad_v2" if version == "2.0" else "rajpurkar/squad",
        licence=LICENCE,
        columns={"question": "text", "context": "pair", "answers": "span, answers"},
        sizes={"train": sizes[0], "test": sizes[1]},
    )
    text = f"SQuAD {version}: {about}. Question and passage are private."
    return offer(
        functools.partial(squad, version), name, card, text, Choice, without=["test_share"]
    )


squad1 = _offer("1.1", "squad", (87599, 10570), "the span of a passage that answers a question")
squad2 = _offer("2.0", "squad2", (130319, 11873), "the same, and some questions have no answer")
