"""The sources of the offline tasks: docstrings, manual, records, and what keeps them apart."""

from __future__ import annotations

import graphlib
import inspect
import re
import subprocess
import sys
import sysconfig
import textwrap
from pydoc_data.topics import topics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vflair_core.errors import TaskError
from vflair_tasks import docstrings, manual, overlap, records

EMAIL = re.compile(r"[\w.-]+@[\w-]+(?:\.[\w-]+)*\w")
NUMBER = re.compile(r"\d{3} \d{3} \d{3}|\d{4}-\d{5}")


def test_plugin_module_offers_its_tasks_without_importing_what_is_heavy():
    code = (
        "import sys, vflair_tasks; print('sst2' in vflair_tasks.vflair_tasks());"
        "print({'torch', 'datasets', 'sklearn', 'pydoc_data', 'vflair_tasks.offline'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert out.stdout.splitlines() == [
        "True",
        "set()",
    ]


def test_docstrings_are_those_the_imported_modules_show():
    public = set(docstrings.docstrings())
    assert inspect.getdoc(textwrap.TextWrapper) in public
    assert inspect.getdoc(textwrap.TextWrapper.wrap) in public
    assert inspect.getdoc(graphlib.TopologicalSorter.done) in public


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A standard library of one module and one package; the real one stays cached."""
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(tmp_path)}.__getitem__)
    monkeypatch.setattr(docstrings, "MODULES", ["module", "package"])
    for path in ("package/tests", "package/inner"):
        (tmp_path / path).mkdir(parents=True)
    return tmp_path


def test_docstrings_are_long_come_once_and_from_no_test_file(library):
    text = {word: f"{word.title()} {'is explained at some length ' * 3}." for word in "abcd"}
    (library / "module.py").write_text(
        f"'''{text['a']}'''\nclass C:\n    '''{text['b']}\n\n      Indented.\n    '''\n"
        "    async def f():\n        'Too short.'\n        raise ImportError('never imported')\n"
    )
    (library / "package/__init__.py").write_text(f"if 1:\n    def f():\n        '''{text['c']}'''")
    (library / "package/inner/again.py").write_text(f"'''{text['a']}'''")
    (library / "package/tests/test_it.py").write_text(f"'''{text['d']}'''")
    (library / "other.py").write_text(f"'''{text['d']}'''")
    read = docstrings.docstrings.__wrapped__()
    assert sorted(read) == [text["a"], f"{text['b']}\n\nIndented.", text["c"]]


def test_a_missing_library_source_is_an_error_that_names_the_module(library):
    (library / "module.py").write_text("")
    with pytest.raises(TaskError, match=r"docstrings of 'package'.*installed as \.py files"):
        docstrings.docstrings.__wrapped__()


def test_every_manual_paragraph_is_printed_by_exactly_the_topics_it_names():
    printed = {
        topic: f" {' '.join(re.findall('[a-z]+', text.lower()))} " for topic, text in topics.items()
    }
    for paragraph in manual.paragraphs():
        words = f" {' '.join(re.findall('[a-z]+', paragraph.text.lower()))} "
        assert {topic for topic, text in printed.items() if words in text} == set(paragraph.topics)


def test_a_paragraph_with_another_footnote_number_is_the_same_and_a_near_copy_is_left_out(
    monkeypatch,
):
    shared = "Only this one rule says\nwhat every loop does in the end when it stops [{}]."
    longer = "And only this one rule says what every loop does in the end when it stops, too."
    own = "Of its own are these ten words of the while loop."
    pages = {
        "for": f"The for statement\n*****\n\n{shared.format(1)}\n\n   for_stmt ::= 'for' ':'\n",
        "while": f"{shared.format(7)}\n \n>>> f(1)\n\n{own}",
        "with": longer,
    }
    monkeypatch.setattr(manual, "topics", pages)
    found = {paragraph.text: paragraph.topics for paragraph in manual.paragraphs.__wrapped__()}
    assert found == {
        " ".join(shared.format(1).split()): ("for", "while"),
        own: ("while",),
    }


def test_manual_paragraphs_are_one_line_of_prose_and_share_no_13_words():
    texts = [paragraph.text for paragraph in manual.paragraphs()]
    assert all(text == " ".join(text.split()) for text in texts)
    assert not [text for text in texts if re.search(r"::=|>>>|\*\*\*\*|====|\|--|--\+", text)]
    seen: dict[str, str] = {}
    for text in texts:
        words = re.sub(r"\W+", " ", text.lower()).split()
        for start in range(len(words) - 12):
            run = " ".join(words[start : start + 13])
            assert seen.setdefault(run, text) == text


@given(st.lists(st.lists(st.sampled_from("abc"), max_size=40).map(" ".join), max_size=4), st.data())
def test_a_document_stays_exactly_if_no_13_of_its_words_occur_in_a_private_text(private, data):
    # Half of the documents quote a private text, else small alphabets would still seldom meet.
    quoted = st.sampled_from(private) if private else st.just("")
    free = st.lists(st.sampled_from("abc"), max_size=20).map(" ".join)
    documents = data.draw(st.lists(st.one_of(free, st.builds("{} {}".format, free, quoted))))

    def quotes(document):
        words = document.split()
        return any(
            f" {' '.join(words[start : start + 13])} " in f" {text} "
            for start in range(len(words) - 12)
            for text in private
        )

    kept = [document for document in documents if not quotes(document)]
    assert overlap.apart_from(private, documents) == kept


def test_case_and_punctuation_do_not_hide_13_shared_words_and_12_may_be_shared():
    phrase = "one two three four five six seven eight nine ten eleven twelve thirteen"
    shouted = f"Zero: {phrase.upper().replace(' ', ', ')}!"
    assert overlap.apart_from([phrase], [shouted]) == []
    twelve = shouted.replace("ONE, ", "")
    assert overlap.apart_from([phrase], [twelve]) == [twelve]


@given(st.integers(0, 2**32), st.integers(1, 30))
def test_spans_of_a_record_cover_exactly_its_name_address_and_number(seed, count):
    for record in records.planted(count, seed=seed):
        (email,) = EMAIL.findall(record.text)
        (number,) = NUMBER.findall(record.text)
        first, last = re.split(r"[._-]", email.split("@")[0])
        names = {f"{first} {last}".title(), f"{last} {first}".title()}
        name = set(record.secrets) - {email, number}
        assert len(record.secrets) == 3
        assert len(name) == 1
        assert {string.title() for string in name} <= names
        assert [record.text[start:end] for start, end in record.private] == list(record.secrets)
        assert record.private == tuple(sorted(record.private))


def test_every_template_plants_one_name_one_address_and_one_number():
    assert len(set(records.TEMPLATES)) == len(records.TEMPLATES) >= 36
    for template in records.TEMPLATES:
        fields = sorted(re.findall(r"\{(\w+)\}", template))
        assert fields in (["email", "name", "phone"], ["account", "email", "name"])


def test_all_names_addresses_and_numbers_differ_up_to_the_last_possible_record():
    possible = len(set(records.FIRST_NAMES)) * len(set(records.LAST_NAMES))
    everything = records.planted(possible, seed=3)
    assert len(everything) == possible >= 3600
    strings = [string.replace("-", "").replace(" ", "") for r in everything for string in r.secrets]
    assert len(set(strings)) == 3 * possible


def test_asking_for_more_records_than_names_is_an_error_that_says_how_many_there_are():
    possible = len(records.FIRST_NAMES) * len(records.LAST_NAMES)
    with pytest.raises(TaskError, match=rf"plant {possible + 1} records.*are {possible} names"):
        records.planted(possible + 1, seed=0)
