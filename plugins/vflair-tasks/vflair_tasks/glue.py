"""The nine tasks of GLUE, scored as its leaderboard does.

Wang et al., "GLUE", ICLR 2019, arXiv 1804.07461. Tests are GLUE's development sets: the labels of its test sets are
not public. Both sentences of a pair are private in full; nothing is put around them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from attrs import field, frozen

from vflair_core import Example, Score, Task, TaskCard
from vflair_tasks.assembly import Choice, Side, assemble, open_sides
from vflair_tasks.checking import label_numbers
from vflair_tasks.metrics import accuracy, accuracy_and_f1, correlations, matthews
from vflair_tasks.offering import offer
from vflair_tasks.rows import Make
from vflair_tasks.tables import Source

HUB = "nyu-mll/glue"
LICENCE = "of the single corpora, see https://gluebenchmark.com/tasks"
TSV: Mapping[str, Any] = {"quoting": 3}  # the distributed files do not quote


@frozen
class Corpus:
    """One of GLUE's tasks. Of each column it says the distributed name, then the hub's.

    Args:
        about: What is asked.
        score: GLUE's metric.
        metric: Name of its first number.
        sizes: Rows of train and test.
        folder: Name of the folder of the distributed files.
        labels: Names of the classes in the hub's order; none for a regression.
        text: Column of the first sentence.
        pair: Column of the second.
        label: Column of the label.
        csv: How the distributed files differ from a tsv with a header.
        dev: Which of two test splits.
    """

    about: str
    score: Score
    metric: str
    sizes: tuple[int, int]
    folder: str
    labels: tuple[str, ...]
    text: tuple[str, ...] = ("sentence",)
    pair: tuple[str, ...] | None = None
    label: tuple[str, ...] = ("label",)
    csv: Mapping[str, Any] = field(factory=dict)
    dev: str = ""


_FOLLOWS = ("entailment", "not_entailment")
_NLI = ("entailment", "neutral", "contradiction")
_SENTENCES: dict[str, Any] = {"text": ("sentence1",), "pair": ("sentence2",)}
_PREMISE: dict[str, Any] = {
    "text": ("sentence1", "premise"),
    "pair": ("sentence2", "hypothesis"),
    "label": ("gold_label", "label"),
}
_BOTH = "accuracy_and_f1"
CORPORA: dict[str, Corpus] = {
    "cola": Corpus(
        "is a sentence acceptable English", matthews, "matthews_from_0", (8551, 1043), "CoLA",
        ("unacceptable", "acceptable"), csv={"header": None, "names": ["source", "label", "mark", "sentence"]},
    ),
    "sst2": Corpus(
        "the mood of a phrase of a film review", accuracy, "accuracy", (67349, 872), "SST-2",
        ("negative", "positive"),
    ),
    "stsb": Corpus(
        "how alike two sentences are, from 0 to 5", correlations, "pearson_and_spearman_from_0", (5749, 1500),
        "STS-B", (), **_SENTENCES, label=("score", "label"),
    ),
    "mrpc": Corpus(
        "do two sentences say the same", accuracy_and_f1, _BOTH, (3668, 408), "MRPC",
        ("not_equivalent", "equivalent"), text=("#1 String", "sentence1"), pair=("#2 String", "sentence2"),
        label=("Quality", "label"),
    ),
    "mnli": Corpus(
        "does a sentence follow from another, genres as in training", accuracy, "accuracy", (392702, 9815),
        "MNLI", _NLI, **_PREMISE, dev="matched",
    ),
    "mnli-mismatched": Corpus(
        "does a sentence follow from another, genres not seen in training", accuracy, "accuracy",
        (392702, 9832), "MNLI", _NLI, **_PREMISE, dev="mismatched",
    ),
    "qnli": Corpus(
        "does a sentence answer a question", accuracy, "accuracy", (104743, 5463), "QNLI", _FOLLOWS,
        text=("question",), pair=("sentence",),
    ),
    "qqp": Corpus(
        "are two questions the same", accuracy_and_f1, _BOTH, (363846, 40430), "QQP",
        ("not_duplicate", "duplicate"), text=("question1",), pair=("question2",), label=("is_duplicate", "label"),
    ),
    "wnli": Corpus(
        "does a sentence with its pronoun resolved follow", accuracy, "accuracy", (635, 71), "WNLI",
        ("not_entailment", "entailment"), **_SENTENCES,
    ),
    "rte": Corpus(
        "does a sentence follow from another", accuracy, "accuracy", (2490, 277), "RTE", _FOLLOWS, **_SENTENCES,
    ),
}  # fmt: skip


def glue(name: str, choice: Choice) -> Task:
    """Return one of GLUE's tasks, from the hub or from files in the hub's or the distributed schema."""
    corpus = CORPORA[name]
    source = Source(HUB, name.partition("-")[0], (corpus.folder,), {".tsv": {**TSV, **corpus.csv}})
    end = f"_{corpus.dev}" if corpus.dev else ""
    sides = open_sides(
        source,
        choice,
        test=(f"validation{end}", f"dev{end}"),
        columns=[corpus.label, corpus.text, *([corpus.pair] if corpus.pair else [])],
    )
    return assemble(
        sides,
        lambda side: _maker(side, corpus.labels),
        choice,
        name=name,
        kind="classification" if corpus.labels else "regression",
        labels=corpus.labels,
        score=corpus.score,
        source=HUB,
        licence=LICENCE,
    )


def _maker(side: Side, labels: tuple[str, ...]) -> Make:
    label, text, *pair = side.columns
    index = label_numbers(side.table, label, labels, where=side.where) if labels else None

    def make(row: Mapping[str, Any], number: int) -> Example:
        return Example(
            text=str(row[text]),
            pair=str(row[pair[0]]) if pair else None,
            label=float(row[label]) if index is None else index[row[label]],
            id=f"{side.name}-{number}",
        )

    return make


def _offer(name: str) -> Callable[..., Task]:
    corpus = CORPORA[name]
    columns = {corpus.text[-1]: "text", corpus.label[-1]: "label"}
    if corpus.pair:
        columns[corpus.pair[-1]] = "pair"
    card = TaskCard(
        kind="classification" if corpus.labels else "regression",
        metric=corpus.metric,
        source=f"{HUB}, {name.partition('-')[0]}",
        licence=LICENCE,
        columns=columns,
        sizes=dict(zip(("train", "test"), corpus.sizes, strict=True)),
    )
    about = f"GLUE {name}: {corpus.about}. All text is private; test is GLUE's development set."
    return offer(functools.partial(glue, name), name, card, about, Choice, without=["test_share"])


cola, sst2, stsb, mrpc, mnli, mnli_mismatched, qnli, qqp, wnli, rte = map(_offer, CORPORA)
