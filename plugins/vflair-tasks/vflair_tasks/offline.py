"""Tasks that need no network: all text comes with Python or is generated.

Three disjoint sources: the manual and the records are private, docstrings are public.
"""

from __future__ import annotations

import platform
import random
from collections import Counter

from vflair_core import Example, Task, TaskCard, TaskError, TaskKind
from vflair_tasks.corpus import with_public_text
from vflair_tasks.manual import Paragraph, paragraphs
from vflair_tasks.records import planted

MANUAL = "the Python manual (pydoc_data.topics)"
RECORDS = "generated records (vflair_tasks.records)"
LICENCE = "PSF-2.0 for manual and docstrings; records are generated"


def python_manual(
    *,
    seed: int = 0,
    records: float = 0.2,
    train_examples: int = 800,
    test_examples: int = 200,
    min_characters: int = 80,
    max_characters: int = 600,
    public_characters: int = 600_000,
) -> Task:
    """Continue private text: paragraphs of the manual, and a share of `records` among them.

    A paragraph is private as a whole, a record only in its name, e-mail address and number.
    """
    if not 0 <= records <= 1:
        raise TaskError(
            f"records={records} is not a share of the examples. "
            "It must lie between 0 (only the manual) and 1 (only records); try records=0.2."
        )
    _check_at_least_one(train_examples=train_examples, test_examples=test_examples)
    train_records = round(records * train_examples)
    test_records = round(records * test_examples)
    train_paragraphs = train_examples - train_records
    wanted = train_paragraphs + test_examples - test_records
    prose = _prose(min_characters, max_characters)
    if wanted > len(prose):
        raise TaskError(
            f"Cannot take {wanted} paragraphs for {train_examples} train and {test_examples} test "
            f"examples with records={records}: the manual of Python {platform.python_version()} "
            f"has {len(prose)} of {min_characters} to {max_characters} characters. "
            "Ask for fewer examples, a larger share of records or other lengths."
        )
    rng = random.Random(f"python-manual {seed}")
    manual = [Example(paragraph.text) for paragraph in rng.sample(prose, wanted)]
    secrets = planted(train_records + test_records, seed=seed)
    train = manual[:train_paragraphs] + secrets[:train_records]
    test = manual[train_paragraphs:] + secrets[train_records:]
    rng.shuffle(train)
    rng.shuffle(test)
    task = Task(
        name="python-manual",
        kind="causal-lm",
        train=train,
        test=test,
        source=f"{MANUAL} and {RECORDS}",
        licence=LICENCE,
        facts={
            "train_records": train_records,
            "test_records": test_records,
            "paragraphs_available": len(prose),
        },
    )
    return with_public_text(task, characters=public_characters)


def manual_chapters(
    *,
    seed: int = 0,
    chapters: int = 4,
    examples_per_chapter: int = 56,
    test_share: float = 0.25,
    min_characters: int = 80,
    max_characters: int = 600,
    public_characters: int = 600_000,
) -> Task:
    """Tell which chapter a private paragraph is from, among the largest topics of the manual.

    Only paragraphs that a single topic prints take part; every topic gives equally many.
    """
    tests = round(test_share * examples_per_chapter)
    if not 0 < tests < examples_per_chapter:
        raise TaskError(
            f"test_share={test_share} of {examples_per_chapter} examples per chapter leaves a "
            "split empty. Both need one or more; try examples_per_chapter=56 and test_share=0.25."
        )
    prose = _prose(min_characters, max_characters)
    own = [paragraph for paragraph in prose if len(paragraph.topics) == 1]
    sizes = Counter(paragraph.topics[0] for paragraph in own).most_common()
    large = [topic for topic, size in sizes if size >= examples_per_chapter]
    if not 1 < chapters <= len(large):
        largest = ", ".join(f"{topic} {size}" for topic, size in sizes[: max(chapters, 2)])
        raise TaskError(
            f"Cannot give {chapters} chapters of {examples_per_chapter} paragraphs each: a task "
            f"needs 2 or more, and {len(large)} topics in the manual of Python "
            f"{platform.python_version()} have that many of {min_characters} to {max_characters} "
            f"characters (largest: {largest}). "
            "Ask for another number of chapters, fewer examples_per_chapter or other lengths."
        )
    labels = tuple(sorted(large[:chapters]))
    rng = random.Random(f"manual-chapters {seed}")
    train, test = [], []
    for label, topic in enumerate(labels):
        texts = [paragraph.text for paragraph in own if paragraph.topics == (topic,)]
        examples = [Example(text, label) for text in rng.sample(texts, examples_per_chapter)]
        test += examples[:tests]
        train += examples[tests:]
    rng.shuffle(train)
    rng.shuffle(test)
    task = Task(
        name="manual-chapters",
        kind="classification",
        train=train,
        test=test,
        labels=labels,
        source=MANUAL,
        licence=LICENCE,
        facts={
            "paragraphs_available": len(own),
            "paragraphs_in_several_topics_excluded": len(prose) - len(own),
        },
    )
    return with_public_text(task, characters=public_characters)


def planted_records(
    *,
    seed: int = 0,
    train_examples: int = 800,
    test_examples: int = 200,
    public_characters: int = 600_000,
) -> Task:
    """Continue records, each private in its name, e-mail address and number."""
    _check_at_least_one(train_examples=train_examples, test_examples=test_examples)
    records = planted(train_examples + test_examples, seed=seed)
    task = Task(
        name="planted-records",
        kind="causal-lm",
        train=records[:train_examples],
        test=records[train_examples:],
        source=RECORDS,
        licence=LICENCE,
    )
    return with_public_text(task, characters=public_characters)


def manual_similarity(
    *,
    seed: int = 0,
    train_examples: int = 300,
    test_examples: int = 80,
    min_characters: int = 80,
    max_characters: int = 600,
    public_characters: int = 600_000,
) -> Task:
    """Tell how much of a private paragraph is left in another, from 0 to 5.

    The other has a share of the words replaced by words of a paragraph that comes nowhere else; the label is 5 times
    the share that is left, by count.
    """
    _check_at_least_one(train_examples=train_examples, test_examples=test_examples)
    count = train_examples + test_examples
    prose = _prose(min_characters, max_characters)
    if 2 * count > len(prose):
        raise TaskError(
            f"Cannot make {count} pairs: the manual of Python {platform.python_version()} has {len(prose)} paragraphs "
            f"of {min_characters} to {max_characters} characters and a pair takes two. Ask for fewer examples "
            "or other lengths."
        )
    rng = random.Random(f"manual-similarity {seed}")
    drawn = [paragraph.text for paragraph in rng.sample(prose, 2 * count)]
    halves = zip(drawn[:count], drawn[count:], strict=True)
    pairs = [_mixed(text, other, rng) for text, other in halves]
    task = Task(
        name="manual-similarity",
        kind="regression",
        train=pairs[:train_examples],
        test=pairs[train_examples:],
        source=MANUAL,
        licence=LICENCE,
    )
    return with_public_text(task, characters=public_characters)


def _mixed(text: str, other: str, rng: random.Random) -> Example:
    """Return `text` beside itself with some of its words replaced by words of `other`."""
    words, strange = text.split(), other.split()
    replaced = rng.sample(range(len(words)), rng.randint(0, len(words)))
    mixed = list(words)
    for place in replaced:
        mixed[place] = rng.choice(strange)
    left = sum(a == b for a, b in zip(words, mixed, strict=True))
    return Example(text, pair=" ".join(mixed), label=5 * left / len(words))


def _check_at_least_one(**counts: int) -> None:
    for option, count in counts.items():
        if count < 1:
            raise TaskError(f"{option}={count} leaves a split empty. Ask for 1 example or more.")


def _prose(shortest: int, longest: int) -> list[Paragraph]:
    return [paragraph for paragraph in paragraphs() if shortest <= len(paragraph.text) <= longest]


def _card(kind: TaskKind, metric: str, source: str, train: int, test: int) -> TaskCard:
    sizes = {"train": train, "test": test}
    return TaskCard(kind=kind, metric=metric, source=source, licence=LICENCE, sizes=sizes)


python_manual.card = _card(  # type: ignore[attr-defined]
    "causal-lm", "token_accuracy", f"{MANUAL} and {RECORDS}", 800, 200
)
manual_chapters.card = _card("classification", "accuracy", MANUAL, 168, 56)  # type: ignore[attr-defined]
planted_records.card = _card("causal-lm", "token_accuracy", RECORDS, 800, 200)  # type: ignore[attr-defined]
manual_similarity.card = _card("regression", "r2", MANUAL, 300, 80)  # type: ignore[attr-defined]
