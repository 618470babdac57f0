"""Classes of whole texts: Yelp's stars, emotions of messages, groups of news. The text is private in full.

Yelp: Zhang et al., NeurIPS 2015, arXiv 1509.01626. Emotion: Saravia et al., "CARER", EMNLP 2018. 20 Newsgroups: Lang,
"NewsWeeder", ICML 1995, in the split by date.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import field, frozen

from vflair_core import Example, Task, TaskCard
from vflair_tasks.assembly import Choice, Side, assemble, open_sides
from vflair_tasks.checking import label_numbers
from vflair_tasks.metrics import accuracy
from vflair_tasks.offering import offer
from vflair_tasks.rows import Make
from vflair_tasks.tables import Original, Row, Source

# The distributed files have no header, and classes from 1.
YELP_CSV: Mapping[str, Any] = {".csv": {"header": None, "names": ["class", "text"]}}
STARS = ("1 star", "2 stars", "3 stars", "4 stars", "5 stars")
GROUPS = tuple(
    """
    alt.atheism comp.graphics comp.os.ms-windows.misc comp.sys.ibm.pc.hardware comp.sys.mac.hardware comp.windows.x
    misc.forsale rec.autos rec.motorcycles rec.sport.baseball rec.sport.hockey sci.crypt sci.electronics sci.med
    sci.space soc.religion.christian talk.politics.guns talk.politics.mideast talk.politics.misc talk.religion.misc
    """.split()
)


def _group_folders(folder: Path, names: Sequence[str]) -> list[Path]:
    """Find ``20news-bydate-train/GROUP/NUMBER``."""
    return sorted(
        path
        for name in names
        for group in GROUPS
        for path in folder.glob(f"*{name}/{group}/*")
        if path.is_file()
    )


def _posts(files: Sequence[str]) -> Iterator[Row]:
    """Read posts without their header, which names the group."""
    for file in files:
        path = Path(file)
        _, _, body = path.read_text(encoding="latin-1").partition("\n\n")
        yield {"text": body.strip(), "label": GROUPS.index(path.parent.name)}


@frozen
class Collection:
    """Texts in classes.

    Args:
        about: What is asked.
        source: Of the data.
        labels: Names of the classes in the hub's order.
        sizes: Rows of train and test.
        licence: Of the text.
        label: Names the label column may have; ``class`` counts from 1.
    """

    about: str
    source: Source
    labels: tuple[str, ...]
    sizes: tuple[int, int]
    licence: str
    label: tuple[str, ...] = field(default=("label",))


COLLECTIONS: dict[str, Collection] = {
    "yelp-polarity": Collection(
        "is a review of a place good or bad",
        Source("fancyzhx/yelp_polarity", folders=("yelp_review_polarity_csv",), csv=YELP_CSV),
        ("bad", "good"),
        (560000, 38000),
        "Yelp Dataset License",
        ("class", "label"),
    ),
    "yelp-full": Collection(
        "how many stars a review of a place gives",
        Source("Yelp/yelp_review_full", folders=("yelp_review_full_csv",), csv=YELP_CSV),
        STARS,
        (650000, 50000),
        "Yelp Dataset License",
        ("class", "label"),
    ),
    "emotion": Collection(
        "which emotion a short message shows",
        Source("dair-ai/emotion", "split"),
        ("sadness", "joy", "love", "anger", "fear", "surprise"),
        (16000, 2000),
        "for research and education",
    ),
    "newsgroups": Collection(
        "which newsgroup a post is from",
        Source("SetFit/20_newsgroups", original=Original(_group_folders, _posts)),
        GROUPS,
        (11314, 7532),
        "public posts",
    ),
}


def collection(name: str, choice: Choice) -> Task:
    """Return the texts in classes of that name."""
    own = COLLECTIONS[name]
    sides = open_sides(own.source, choice, columns=[("text",), own.label])
    return assemble(
        sides,
        lambda side: _maker(side, own.labels),
        choice,
        name=name,
        kind="classification",
        labels=own.labels,
        score=accuracy,
        source=own.source.hub,
        licence=own.licence,
    )


def _maker(side: Side, labels: tuple[str, ...]) -> Make:
    text, label = side.columns
    # A number from 1 as text is a name; the classes are then called by it.
    names = [str(n + 1) for n in range(len(labels))] if label == "class" else labels
    index = label_numbers(side.table, label, names, where=side.where)

    def make(row: Mapping[str, Any], number: int) -> Example:
        return Example(text=row[text], label=index[row[label]], id=f"{side.name}-{number}")

    return make


def _card(own: Collection) -> TaskCard:
    return TaskCard(
        kind="classification",
        metric="accuracy",
        source=own.source.hub,
        licence=own.licence,
        columns={"text": "text", "label": "label"},
        sizes=dict(zip(("train", "test"), own.sizes, strict=True)),
    )


yelp_polarity, yelp_full, emotion, newsgroups = (
    offer(
        functools.partial(collection, name),
        name,
        _card(own),
        f"{own.about[0].upper()}{own.about[1:]}: the text is private in full.",
        Choice,
        without=["test_share"],
    )
    for name, own in COLLECTIONS.items()
)
