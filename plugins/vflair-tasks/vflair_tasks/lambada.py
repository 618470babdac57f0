"""LAMBADA: the last word of a passage, which only the whole passage tells. The passage is private in full.

Paperno et al., ACL 2016, arXiv 1606.06031. Train is the development set, whose rows are passages as those of the test set;
the train set of the paper is whole novels. A word is right if what is generated begins with it, whatever the number of its
tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from vflair_core import Example, Task, TaskCard, TaskError
from vflair_tasks.assembly import Choice, Side, assemble, open_sides
from vflair_tasks.offering import Asking, asked, offer
from vflair_tasks.prompts import Prompt
from vflair_tasks.rows import Make
from vflair_tasks.tables import Source

SOURCE = Source("cimec/lambada", folders=("plain_text", "lambada-dataset"))
LICENCE = "CC-BY-4.0"
_WORD = re.compile(r"[^\W_]+(?:['’.-][^\W_]+)*")


def score(predictions: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
    """Return the share of passages whose next word is the right one; case counts, signs around it do not."""
    pairs = zip(predictions, examples, strict=True)
    return {
        "accuracy": sum(first_word(said) == first_word(e.answer or "") for said, e in pairs)
        / len(examples)
    }


def first_word(text: str) -> str:
    """Return the first word of a text, without signs around it; its first sign if it has no word."""
    found = _WORD.search(text)
    return found[0] if found else text.strip()[:1]


def _lambada(choice: Choice, asking: Asking) -> Task:
    sides = open_sides(
        SOURCE,
        choice,
        train=("validation", "lambada_development_plain_text", "dev"),
        test=("test", "lambada_test_plain_text", "lambada_test"),
        columns=[("text",)],
    )
    task = assemble(
        sides,
        _maker,
        choice,
        name="lambada",
        kind="causal-lm",
        score=score,
        generation={"max_new_tokens": 8},
        source=SOURCE.hub,
        licence=LICENCE,
    )
    return asked(task, Prompt("{text}", names={"text": "text"}), asking, seed=choice.seed)


def _maker(side: Side) -> Make:
    def make(row: Mapping[str, Any], number: int) -> Example:
        *before, last = row["text"].rsplit(maxsplit=1)
        if not before:
            raise TaskError(f"{side.where}, row {number} has one word: {last!r}. Drop the row.")
        return Example(text=before[0], answer=last, id=f"{side.name}-{number}")

    return make


lambada = offer(
    _lambada,
    "lambada",
    TaskCard(
        kind="causal-lm",
        metric="accuracy",
        source=f"{SOURCE.hub}, development and test set",
        licence=LICENCE,
        columns={"text": "text and, its last word, answer"},
        sizes={"train": 4869, "test": 5153},
    ),
    "LAMBADA: write the last word of a passage. The passage is private.",
    Choice,
    Asking,
    without=["test_share"],
)
