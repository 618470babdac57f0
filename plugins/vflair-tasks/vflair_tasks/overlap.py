"""Keep public and private text apart: no run of 13 words in both.

Brown et al., "Language Models are Few-Shot Learners", NeurIPS 2020, arXiv 2005.14165, appendix C.
Differs from the paper: one shared 13-gram removes the whole document, where the paper cuts out the
shared passage and keeps pieces.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

N = 13
Gram = tuple[str, ...]


def apart_from(private: Iterable[str], documents: Iterable[str]) -> list[str]:
    """Return the documents that share no 13-gram with any private text, in their order."""
    secret = set[Gram]().union(*map(grams, private))
    return [document for document in documents if secret.isdisjoint(grams(document))]


def apart_from_each_other(texts: Iterable[str]) -> list[str]:
    """Return the texts that share no 13-gram with a returned text before them."""
    kept, seen = [], set[Gram]()
    for text in texts:
        found = grams(text)
        if seen.isdisjoint(found):
            kept.append(text)
            seen |= found
    return kept


def grams(text: str) -> set[Gram]:
    """Return every run of 13 lower-cased words; a shorter text has none."""
    words = re.findall(r"\w+", text.lower())
    return set(zip(*(words[start:] for start in range(N)), strict=False))
