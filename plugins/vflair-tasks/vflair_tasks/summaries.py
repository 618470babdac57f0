"""CNN/DailyMail: the highlights of a news article. The article is private, the template is not.

Hermann et al., NeurIPS 2015, arXiv 1506.03340; See et al., ACL 2017, arXiv 1704.04368: version 3.0.0, whose names are not
replaced.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import frozen

from vflair_core import Example, Task, TaskCard, TaskError
from vflair_tasks.assembly import Choice, Side, assemble, open_sides
from vflair_tasks.metrics import texts
from vflair_tasks.offering import Asking, asked, offer
from vflair_tasks.prompts import Prompt
from vflair_tasks.rows import Make
from vflair_tasks.tables import Source

SOURCE = Source("abisee/cnn_dailymail", "3.0.0")
TEMPLATES = {"seq2seq": "summarize: {article}", "causal-lm": "{article}\n\nTL;DR:"}


@frozen
class Writing:
    """What writes the summary.

    Args:
        kind: ``seq2seq`` or ``causal-lm``.
    """

    kind: str = "seq2seq"


def _cnn_dailymail(choice: Choice, asking: Asking, writing: Writing) -> Task:
    if writing.kind not in TEMPLATES:
        raise TaskError(f"kind={writing.kind!r} writes no summary. Possible: seq2seq, causal-lm.")
    task = assemble(
        open_sides(SOURCE, choice, columns=[("article",), ("highlights",)]),
        _maker,
        choice,
        name="cnn-dailymail",
        kind=writing.kind,
        score=texts("rougeL"),
        generation={"max_new_tokens": 128},
        source=SOURCE.hub,
        licence="Apache-2.0",
    )
    prompt = Prompt(TEMPLATES[writing.kind], names={"article": "text"})
    return asked(task, prompt, asking, seed=choice.seed)


def _maker(side: Side) -> Make:
    article, highlights = side.columns

    def make(row: Mapping[str, Any], number: int) -> Example:
        name = str(row.get("id") or f"{side.name}-{number}")
        return Example(text=row[article], answer=row[highlights], id=name)

    return make


cnn_dailymail = offer(
    _cnn_dailymail,
    "cnn-dailymail",
    TaskCard(
        kind="seq2seq",
        metric="rougeL",
        source=f"{SOURCE.hub}, {SOURCE.config}",
        licence="Apache-2.0",
        columns={"article": "text", "highlights": "answer"},
        sizes={"train": 287113, "test": 11490},
    ),
    "CNN/DailyMail: summarize a news article. The article is private.",
    Choice,
    Asking,
    Writing,
    without=["test_share"],
)
