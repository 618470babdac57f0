"""A defense that replaces words by words, as a plugin in one file, and texts whose words are not all alike."""

from __future__ import annotations

import random

import torch
from attrs import define, frozen

from vflair_core import Defense, Example, Task, hookimpl
from vflair_core.defenses.mechanism import Replacement

WORDS = (
    "river", "stone", "lamp", "paper", "cloud", "engine", "winter", "garden", "copper", "signal", "harbour", "window",
)  # fmt: skip


@hookimpl
def vflair_defenses():
    return {"swap-words": SwapWords}


@hookimpl
def vflair_tasks():
    return {"sequences": sequences}


@define(slots=False)
class SwapWords(Defense):
    """Replaces each word by another, always the same, and with chance `noise` by any."""

    noise: float = 0.0
    covers = frozenset({"prompt"})

    def prepare(self, public_texts, data_party):
        self.generator = data_party.defenses.generator_of(self)

    def on_text(self, fields):
        return {name: " ".join(map(self._other, text.split())) for name, text in fields.items()}

    def _other(self, word):
        if float(torch.rand((), generator=self.generator)) < self.noise:
            return WORDS[int(torch.randint(len(WORDS), (), generator=self.generator))]
        return WORDS[(WORDS.index(word) * 5 + 3) % len(WORDS)]

    def replacement(self, tokenizer, embeddings, public_texts):
        return Swapped(WORDS, self.noise)


@frozen
class Swapped(Replacement):
    words: tuple[str, ...]
    noise: float

    def log_probabilities(self, numbers):
        said = torch.full((len(numbers), len(WORDS)), self.noise / len(WORDS))
        said[torch.arange(len(numbers)), (numbers * 5 + 3) % len(WORDS)] += 1 - self.noise
        return said.log()


def _texts(count, seed):
    """Each word is followed by one of two."""
    chooser, texts = random.Random(seed), []
    for _ in range(count):
        at, words = chooser.randrange(len(WORDS)), []
        for _ in range(8):
            words.append(WORDS[at])
            at = (at + chooser.choice((1, 3))) % len(WORDS)
        texts.append(" ".join(words))
    return texts


def sequences() -> Task:
    return Task(
        name="sequences",
        kind="causal-lm",
        train=[Example(text) for text in _texts(24, 1)],
        test=[Example(text) for text in _texts(4, 2)],
        public=_texts(60, 3),
    )
