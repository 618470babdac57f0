"""Instructions and their responses: Alpaca, Dolly, CodeAlpaca. Instruction and input are private, the template is not.

Taori et al., "Stanford Alpaca", 2023; Conover et al., "Free Dolly", 2023; Chaudhary, "Code Alpaca", 2023. Each has one split:
the test rows are carved from it so that no instruction is in both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from attrs import frozen

from vflair_core import Example, Score, Task, TaskCard, TaskError
from vflair_tasks.assembly import Choice, Side, assemble, open_sides
from vflair_tasks.metrics import codebleu, texts
from vflair_tasks.offering import Asking, asked, offer
from vflair_tasks.prompts import Prompt
from vflair_tasks.rows import Make
from vflair_tasks.tables import Source

# The words the data sets were published with; a model tuned on them elsewhere expects exactly these.
_INTRO = "Below is an instruction that describes a task{more}. Write a response that appropriately completes the request."
_ALONE = _INTRO.format(more="") + "\n\n### Instruction:\n{instruction}\n\n### Response:\n"
_WITH = (
    _INTRO.format(more=", paired with an input that provides further context")
    + "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_DOLLY_WITH = _INTRO.format(more="") + (
    "\n\n### Instruction:\n{instruction}\n\nInput:\n{context}\n\n### Response:\n"
)


@frozen
class Coding:
    """How code is compared.

    Args:
        metric: ``bleu``, or ``codebleu`` of one language.
        language: Of CodeBLEU, such as ``python``; the data set has several, and answers in others score low whatever
            they say.
    """

    metric: str = "bleu"
    language: str = ""


@frozen
class Instructions:
    """A data set of instructions.

    Args:
        about: What is asked.
        source: Of the data.
        train: Names its file may have.
        context: Column of the input.
        answer: Names of the column of the response.
        prompt: Its template, with and without an input.
        metric: First metric.
        rows: Number of rows.
        licence: Of the text.
    """

    about: str
    source: Source
    train: tuple[str, ...]
    context: str
    answer: tuple[str, ...]
    prompt: Prompt
    metric: str
    rows: int
    licence: str


_ALPACA = Prompt(_WITH, names={"instruction": "text", "input": "pair"}, alone=_ALONE)
_DOLLY = Prompt(_DOLLY_WITH, names={"instruction": "text", "context": "pair"}, alone=_ALONE)
SETS: dict[str, Instructions] = {
    "alpaca": Instructions(
        "follow an instruction", Source("tatsu-lab/alpaca"), ("train", "alpaca_data"), "input", ("output",),
        _ALPACA, "rougeL", 52002, "CC-BY-NC-4.0",
    ),
    "dolly": Instructions(
        "follow an instruction that an employee of Databricks wrote", Source("databricks/databricks-dolly-15k"),
        ("train", "databricks-dolly-15k"), "context", ("response",), _DOLLY, "rougeL", 15011, "CC-BY-SA-3.0",
    ),
    "codealpaca": Instructions(
        "write code", Source("sahil2801/CodeAlpaca-20k"), ("train", "code_alpaca_20k"), "input",
        ("output", "completion"), _ALPACA, "bleu", 20022, "CC-BY-4.0",
    ),
}  # fmt: skip


def _instructions(name: str, choice: Choice, asking: Asking, coding: Coding | None = None) -> Task:
    own = SETS[name]
    sides = open_sides(
        own.source,
        choice,
        train=own.train,
        columns=[("instruction", "prompt"), own.answer],
        share=True,
    )
    task = assemble(
        sides,
        functools.partial(_maker, context=own.context),
        choice,
        name=name,
        kind="causal-lm",
        score=_score(coding) if coding else texts(own.metric),
        generation={"max_new_tokens": 256},
        source=own.source.hub,
        licence=own.licence,
    )
    return asked(task, own.prompt, asking, seed=choice.seed)


def _score(coding: Coding) -> Score:
    if coding.metric not in ("bleu", "codebleu"):
        raise TaskError(f"metric={coding.metric!r} is unknown. Possible: bleu, codebleu.")
    if (coding.metric == "codebleu") != bool(coding.language):
        raise TaskError(
            f"metric={coding.metric!r} with language={coding.language!r}: CodeBLEU is of one language, e.g. "
            'metric = "codebleu", language = "python", and bleu is of none.'
        )
    return codebleu(coding.language) if coding.metric == "codebleu" else texts("bleu")


def _maker(side: Side, *, context: str) -> Make:
    instruction, answer = side.columns

    def make(row: Mapping[str, Any], number: int) -> Example:
        more = row.get(context)
        return Example(
            text=row[instruction],
            pair=more if more and more.strip() else None,
            answer=row[answer],
            id=f"row-{number}",
        )

    return make


def _offer(name: str, *more: type) -> Callable[..., Task]:
    own = SETS[name]
    card = TaskCard(
        kind="causal-lm",
        metric=own.metric,
        source=own.source.hub,
        licence=own.licence,
        columns={"instruction": "text", own.context: "pair", own.answer[0]: "answer"},
        sizes={"train": round(0.9 * own.rows), "test": own.rows - round(0.9 * own.rows)},
    )
    about = f"{name}: {own.about}. Instruction and input are private; test is a share of the rows."
    build = functools.partial(_instructions, name)
    return offer(build, name, card, about, Choice, Asking, *more)


alpaca, dolly, codealpaca = _offer("alpaca"), _offer("dolly"), _offer("codealpaca", Coding)
