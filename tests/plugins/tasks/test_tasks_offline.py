"""The offline tasks: reproducible, disjoint, balanced, and clear about what they cannot do."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pydoc_data.topics import topics

import pytest

from vflair_core.errors import TaskError
from vflair_tasks.offline import manual_chapters, planted_records, python_manual

TASKS = (python_manual, manual_chapters, planted_records)
EMAIL = re.compile(r"[\w.-]+@[\w-]+(?:\.[\w-]+)*\w")


@pytest.fixture(scope="module", params=TASKS, ids=lambda task: task.__name__)
def make(request):
    return request.param


@pytest.fixture(scope="module")
def task(make):
    return make()


@pytest.fixture(scope="module")
def chapters():
    return manual_chapters()


def runs_of_13(text):
    words = [word for word in re.split(r"[^\w]+", text.lower()) if word]
    return {" ".join(words[start : start + 13]) for start in range(len(words) - 12)}


def one_line(text):
    return " ".join(text.lower().split())


ONE_LINE_OF = {topic: one_line(text) for topic, text in topics.items()}


def test_equal_seeds_give_the_equal_task_and_other_seeds_another(make, task):
    assert make(seed=0) == task
    other = make(seed=1)
    assert {e.text for e in other.train} != {e.text for e in task.train}
    assert other.facts["corpus_sha256"] != task.facts["corpus_sha256"]
    assert other.public == task.public


def test_corpus_hash_does_not_depend_on_the_hash_seed_of_the_process(chapters):
    code = (
        "from vflair_tasks.offline import manual_chapters;"
        "print(manual_chapters().facts['corpus_sha256'])"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "4711"}
    out = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment
    )
    assert out.stdout.strip() == chapters.facts["corpus_sha256"]


def test_public_text_shares_no_13_words_in_a_row_with_private_text(task):
    private = set().union(*(runs_of_13(e.text) for e in [*task.train, *task.test]))
    public = set().union(*(runs_of_13(text) for text in task.public))
    assert len(private) > 1000
    assert len(public) > 10_000
    assert not private & public


def test_public_text_shares_no_13_words_in_a_row_with_any_of_the_manual(task):
    manual = set().union(*(runs_of_13(text) for text in topics.values()))
    assert not [text for text in task.public if manual & runs_of_13(text)]


def test_public_text_is_the_same_for_all_tasks_whole_and_within_its_limit(task, chapters):
    assert task.public == chapters.public
    assert 590_000 < sum(len(text) for text in task.public) <= 600_000
    small = planted_records(train_examples=1, test_examples=1, public_characters=5000)
    assert sum(len(text) for text in small.public) <= 5000
    assert small.public == task.public[: len(small.public)]
    assert planted_records(train_examples=1, test_examples=1, public_characters=0).public == []


def test_the_debugger_whose_docstrings_repeat_the_manual_is_removed_and_counted(task):
    repeated = "Continue execution until the next line in the current function is reached"
    assert repeated in " ".join(topics["debugger"].split())
    assert not [text for text in task.public if repeated in " ".join(text.split())]
    assert task.facts["public_documents_removed_for_overlap"] >= 10


def test_no_private_text_comes_twice_within_or_across_splits(task):
    texts = [one_line(e.text) for e in [*task.train, *task.test]]
    assert len(set(texts)) == len(texts)


def test_no_person_address_or_number_is_in_two_records():
    task = planted_records()
    secrets = [secret for e in [*task.train, *task.test] for secret in e.secrets]
    assert len(secrets) == len(set(secrets)) == 3000


def test_sizes_are_the_ones_asked_for():
    task = python_manual(train_examples=30, test_examples=10, records=0.3)
    assert (len(task.train), len(task.test)) == (30, 10)
    records = [sum(e.private is not None for e in split) for split in (task.train, task.test)]
    assert records == [9, 3]
    chapters = manual_chapters(chapters=3, examples_per_chapter=20, test_share=0.4)
    assert (len(chapters.train), len(chapters.test)) == (36, 24)


@pytest.mark.parametrize(("share", "kinds"), [(0.0, {False}), (0.5, {False, True}), (1.0, {True})])
def test_the_share_of_records_mixes_paragraphs_and_planted_strings(share, kinds):
    task = python_manual(train_examples=40, test_examples=10, records=share)
    for split in (task.train, task.test):
        assert {e.private is not None for e in split} == kinds
        for example in split:
            if example.private is None:
                assert any(one_line(example.text) in text for text in ONE_LINE_OF.values())
            else:
                assert EMAIL.search(example.text)[0] in example.secrets


def test_records_and_paragraphs_are_shuffled_together():
    marks = "".join("r" if e.private else "p" for e in python_manual(records=0.5).train)
    assert "rp" in marks
    assert "pr" in marks


def test_chapters_are_balanced_in_both_splits(chapters):
    assert Counter(e.label for e in chapters.train) == dict.fromkeys(range(4), 42)
    assert Counter(e.label for e in chapters.test) == dict.fromkeys(range(4), 14)


def test_a_chapter_paragraph_is_printed_by_the_topic_of_its_label_and_by_no_other(chapters):
    for example in [*chapters.train, *chapters.test]:
        printing = [t for t, text in topics.items() if one_line(example.text) in ONE_LINE_OF[t]]
        assert printing == [chapters.labels[example.label]]


def test_paragraphs_of_several_topics_exist_are_counted_and_take_no_part(chapters):
    owners = {}
    for topic, text in topics.items():
        for paragraph in text.split("\n\n"):
            owners.setdefault(one_line(paragraph), set()).add(topic)
    shared = {paragraph for paragraph, owning in owners.items() if len(owning) > 1}
    assert 100 < chapters.facts["paragraphs_in_several_topics_excluded"] <= len(shared)
    assert not shared & {one_line(e.text) for e in [*chapters.train, *chapters.test]}


def test_lengths_are_within_the_limits_asked_for():
    task = python_manual(
        records=0.0, train_examples=50, test_examples=10, min_characters=100, max_characters=200
    )
    assert all(100 <= len(e.text) <= 200 for e in [*task.train, *task.test])


def test_facts_can_be_written_as_json_and_count_the_characters(task):
    facts = json.loads(json.dumps(task.facts))
    assert facts["private_characters"] == sum(len(e.text) for e in [*task.train, *task.test])
    assert facts["public_characters"] == sum(len(text) for text in task.public)
    assert facts["python"] == sys.version.split()[0]
    assert re.fullmatch("[0-9a-f]{64}", facts["corpus_sha256"])
    assert "PSF" in task.licence
    assert "docstrings" in task.source


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (python_manual, {"records": 1.5}, "records=1.5 is not a share.*between 0.*and 1.*try"),
        (python_manual, {"records": -0.1}, "records=-0.1 is not a share"),
        (python_manual, {"train_examples": 9000}, r"Cannot take 7360 paragraphs.*Ask for fewer"),
        (python_manual, {"test_examples": 0}, "test_examples=0 leaves a split empty.*1 example"),
        (python_manual, {"min_characters": 500, "max_characters": 400}, "has 0 of 500 to 400"),
        (planted_records, {"train_examples": 0}, "train_examples=0 leaves a split empty"),
        (planted_records, {"train_examples": 9000}, "Cannot plant 9200 records.*Ask for at most"),
        (planted_records, {"public_characters": -1}, "public_characters=-1 is negative.*Give 0"),
        (manual_chapters, {"chapters": 70}, "Cannot give 70 chapters of 56.*types.*Ask for"),
        (manual_chapters, {"chapters": 1}, "Cannot give 1 chapters.*needs 2 or more"),
        (manual_chapters, {"examples_per_chapter": 9000}, "and 0 topics in the manual"),
        (manual_chapters, {"test_share": 1.0}, "test_share=1.0 of 56.*leaves a split empty.*try"),
        (manual_chapters, {"test_share": 0.0}, "test_share=0.0"),
    ],
)
def test_an_impossible_option_is_an_error_that_says_what_is_possible(make, options, words):
    with pytest.raises(TaskError, match=words):
        make(**options)
