"""Complete a private task: the public text that shares nothing with it, and the facts on both."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from typing import Any

from attrs import asdict, evolve

from vflair_core import Example, Task, TaskError
from vflair_tasks.docstrings import docstrings
from vflair_tasks.manual import whole_text
from vflair_tasks.overlap import apart_from


def with_public_text(task: Task, *, characters: int) -> Task:
    """Return `task` with at most `characters` of docstrings, whole ones, as its public text.

    A docstring that shares 13 words in a row with the manual or an example is left out. All of the
    manual counts, whatever the task takes of it: so all tasks have one public text between them,
    and one pretraining serves all.
    """
    if characters < 0:
        raise TaskError(
            f"public_characters={characters} is negative. Give 0 for no public text, "
            "or a limit such as 600000."
        )
    examples = [*task.train, *task.test]
    private = [text for example in examples for text in _texts(example)]
    apart = apart_from([*whole_text(), *private], docstrings())
    public = _first(apart, characters)
    corpus = json.dumps([list(map(_content, examples)), len(task.train), public])
    return evolve(
        task,
        public=public,
        source=f"private: {task.source}; public: docstrings of the standard library",
        facts={
            "python": platform.python_version(),
            "corpus_sha256": hashlib.sha256(corpus.encode()).hexdigest(),
            "private_characters": sum(len(e.text) + len(e.pair or "") for e in examples),
            "public_characters": sum(map(len, public)),
            "public_documents": len(public),
            "public_documents_removed_for_overlap": len(docstrings()) - len(apart),
            **task.facts,
        },
    )


def _texts(example: Example) -> list[str]:
    return [example.text, *filter(None, [example.pair]), *example.accepted, *example.choices]


def _content(example: Example) -> list[Any]:
    pixels = [hashlib.sha256(picture.tobytes()).hexdigest() for picture in example.images]
    fields = asdict(evolve(example, images=()), filter=lambda field, _: field.name != "chat")
    return [*fields.values(), pixels]


def _first(documents: Sequence[str], characters: int) -> list[str]:
    kept = []
    for document in documents:
        characters -= len(document)
        if characters < 0:
            break
        kept.append(document)
    return kept
