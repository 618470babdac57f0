r"""Problems whose answer is a number or a formula at the end of a solution: GSM8K and MATH. The problem is private.

Cobbe et al., arXiv 2110.14168; Hendrycks et al., NeurIPS 2021, arXiv 2103.03874. A model learns whole solutions and is judged
on their ends: in GSM8K the number behind ``####``, in MATH what stands in ``\boxed{}``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from vflair_core import Example, Task, TaskCard
from vflair_tasks.assembly import Choice, Side, assemble, open_sides
from vflair_tasks.formulas import boxed, same_formula
from vflair_tasks.offering import Asking, asked, offer
from vflair_tasks.prompts import Prompt
from vflair_tasks.rows import Make
from vflair_tasks.tables import Original, Row, Source

_MARKED = re.compile(r"####\s*(-?[\d.,]+)")
# In "10-5" and "x-5" the sign is no part of the number; ".5" is one.
_NUMBER = re.compile(r"(?:(?<![\w.)\]])-)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_ANNOTATION = re.compile(r"<<[^>]*>>")  # what the paper's calculator reads


def gsm8k_score(predictions: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
    """Return how often the number behind ``####`` is right, and how often the last number of the text is."""
    truth = [_number(_MARKED, example.answer or "") for example in examples]
    marked = [_number(_MARKED, said) for said in predictions]
    last = [last_number(said) for said in predictions]
    return {
        "exact_match": _share(marked, truth),
        "exact_match_of_last_number": _share(last, truth),
    }


def last_number(text: str) -> Decimal | None:
    """Return the last number of a text, without the commas between its digits; None if it has none."""
    return _number(_NUMBER, text, last=True)


def _number(pattern: re.Pattern[str], text: str, *, last: bool = False) -> Decimal | None:
    found = list(pattern.finditer(text))
    if not found:
        return None
    match = found[-1 if last else 0]
    try:
        return Decimal(match[match.lastindex or 0].replace(",", "").rstrip("."))
    except InvalidOperation:  # signs without a digit, such as "#### ."
        return None


def _share(said: Sequence[Decimal | None], truth: Sequence[Decimal | None]) -> float:
    right = sum(a is not None and a == b for a, b in zip(said, truth, strict=True))
    return right / len(truth)


def math_score(predictions: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
    """Return how often the last boxed formula is the same as that of the solution."""
    pairs = zip(predictions, examples, strict=True)
    right = sum(same_formula(boxed(said), boxed(e.answer or "")) for said, e in pairs)
    return {"exact_match": right / len(examples)}


def _gsm8k(choice: Choice, asking: Asking) -> Task:
    source = Source("openai/gsm8k", "main")
    task = assemble(
        open_sides(source, choice, columns=[("question",), ("answer",)]),
        _maker,
        choice,
        name="gsm8k",
        kind="causal-lm",
        score=gsm8k_score,
        generation={"max_new_tokens": 256},
        source=source.hub,
        licence="MIT",
    )
    prompt = Prompt("Question: {question}\nAnswer:", names={"question": "text"})
    return asked(task, prompt, asking, seed=choice.seed)


def _math(choice: Choice, asking: Asking) -> Task:
    source = Source(
        "DigitalLearningGmbH/MATH-lighteval",
        "default",
        folders=("MATH",),
        original=Original(_problem_files, _problems),
    )
    task = assemble(
        open_sides(source, choice, columns=[("problem",), ("solution",)]),
        _maker,
        choice,
        name="math",
        kind="causal-lm",
        score=math_score,
        generation={"max_new_tokens": 512},
        source=source.hub,
        licence="MIT",
    )
    prompt = Prompt("Problem: {problem}\nSolution:", names={"problem": "text"})
    return asked(task, prompt, asking, seed=choice.seed)


def _problem_files(folder: Path, names: Sequence[str]) -> list[Path]:
    """Find ``train/algebra/1.json``."""
    return sorted(path for name in names for path in folder.glob(f"{name}/*/*.json"))


def _problems(files: Sequence[str]) -> Iterator[Row]:
    for file in files:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
        yield {key: found[key] for key in ("problem", "level", "type", "solution")}


def _maker(side: Side) -> Make:
    question, answer = side.columns

    def make(row: Mapping[str, Any], number: int) -> Example:
        solution = _ANNOTATION.sub("", row[answer])
        return Example(text=row[question], answer=solution, id=f"{side.name}-{number}")

    return make


gsm8k = offer(
    _gsm8k,
    "gsm8k",
    TaskCard(
        kind="causal-lm",
        metric="exact_match",
        source="openai/gsm8k, main",
        licence="MIT",
        columns={"question": "text", "answer": "answer, without the calculator's annotations"},
        sizes={"train": 7473, "test": 1319},
    ),
    "GSM8K: solve a word problem. The problem is private.",
    Choice,
    Asking,
    without=["test_share"],
)
math = offer(
    _math,
    "math",
    TaskCard(
        kind="causal-lm",
        metric="exact_match",
        source="DigitalLearningGmbH/MATH-lighteval",
        licence="MIT",
        columns={"problem": "text", "solution": "answer"},
        sizes={"train": 7500, "test": 5000},
    ),
    "MATH: solve a competition problem. The problem is private.",
    Choice,
    Asking,
    without=["test_share"],
)
