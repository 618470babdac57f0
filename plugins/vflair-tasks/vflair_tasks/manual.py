"""The private source: prose paragraphs of the Python manual, each with the topics that print it."""

from __future__ import annotations

import re
from functools import cache
from pydoc_data.topics import topics

from attrs import frozen

from vflair_tasks.overlap import apart_from_each_other

_MIN_WORDS = 10
_MIN_SHARE_OF_LETTERS = 0.8


@frozen
class Paragraph:
    """One paragraph on one line, and the topics of the manual in which it occurs."""

    text: str
    topics: tuple[str, ...]


@cache
def paragraphs() -> tuple[Paragraph, ...]:
    """Return the paragraphs of prose; no two of them share 13 words in a row.

    Several topics print the same paragraph (``if`` is a part of ``compound``): it comes once here,
    with all of its topics, also when only numbers such as those of footnotes differ.
    """
    texts: dict[str, str] = {}
    owners: dict[str, list[str]] = {}
    for topic in sorted(topics):
        for chunk in re.split(r"\n\s*\n", topics[topic]):
            text = " ".join(chunk.split())
            letters = normalised(text)
            texts.setdefault(letters, text)
            found_in = owners.setdefault(letters, [])
            if topic not in found_in:
                found_in.append(topic)
    prose = filter(_is_prose, texts.values())
    return tuple(
        Paragraph(text, tuple(owners[normalised(text)])) for text in apart_from_each_other(prose)
    )


def whole_text() -> list[str]:
    """Return everything in the manual, code and tables too."""
    return [topics[topic] for topic in sorted(topics)]


def normalised(text: str) -> str:
    """Return the lower-cased words of letters, which tell whether two paragraphs are the same."""
    return " ".join(re.findall(r"[a-z]+", text.lower()))


def _is_prose(text: str) -> bool:
    """Tell sentences from headings, grammar, code and tables."""
    letters = sum(character.isalpha() or character == " " for character in text)
    return (
        len(re.findall(r"[A-Za-z]{2,}", text)) >= _MIN_WORDS
        and letters >= _MIN_SHARE_OF_LETTERS * len(text)
        and re.search(r"[.:!?)\]]$", text) is not None
        and re.search(r"::=|>>>|[*=~^\"-]{4}", text) is None
    )
