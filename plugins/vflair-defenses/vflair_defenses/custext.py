"""Replace words within small sets of similar words."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from attrs import define, field, frozen, validators
from torch import Tensor

from vflair_core import Defense, Guarantee, Replacement
from vflair_defenses.neighbours import (
    Vocabulary,
    draw,
    located,
    partition_by_distance,
    read_vocabulary,
    substitute,
    vocabulary_of,
)
from vflair_defenses.santext import SUPPORTED, ready

if TYPE_CHECKING:
    from vflair_core import Party

STOP_WORDS = frozenset(
    "a an the this that these those and or but if while of at by for with about into through during before after "
    "to from in out on off over under again then once here there all any both each few more most other some such no "
    "not only own same so than too very can will just i me my we our you your he him his she her it its they them "
    "their what which who whom is am are was were be been being have has had do does did as".split()
)


@define(slots=False)
class CusText(Defense):
    """Part the vocabulary into sets of K similar words and replace each word within its set, ∝ exp(ε·u/2).

    Chen et al., "A Customized Text Sanitization Mechanism with Differential Privacy", Findings of ACL 2023, arXiv
    2207.01193; u ∈ [0, 1] is the similarity to the word, scaled to the set's own range. Sets are made greedily, the
    most frequent words of public text first. ε holds between words of one set; between sets it is infinite: the
    set itself is told. A word outside the vocabulary stays in clear, and is counted. Differs from VFLAIR-LLM, which
    trains its word vectors on the private text.

    Attributes:
        epsilon: ε of one word, within its set; inf changes nothing.
        size: K, words of a set.
        vectors: File of public word vectors; empty takes the model's embeddings.
        spacing: Keep the characters between words.
        stop_words: Leave English function words as they are (CusText+).
    """

    epsilon: float = field(default=1.0, validator=validators.ge(0))
    size: int = field(default=20, validator=validators.ge(2))
    vectors: str = field(default="", converter=located)
    spacing: bool = False
    stop_words: bool = False
    tally: Counter[str] = field(init=False, factory=Counter, eq=False)
    _vocabulary: Vocabulary | None = field(init=False, default=None, eq=False)
    _generator: torch.Generator | None = field(init=False, default=None, eq=False)
    _sets: Tensor = field(init=False, factory=lambda: torch.empty(0, dtype=torch.int64), eq=False)

    covers = frozenset({"prompt"})
    supports = SUPPORTED

    def prepare(self, public_texts: Sequence[str], data_party: Party) -> None:
        """Read the words and part them into sets."""
        self._vocabulary = read_vocabulary("CusText", self.vectors, data_party)
        self._generator = data_party.defenses.generator_of(self)
        vocabulary = self._vocabulary
        order = vocabulary.by_frequency(public_texts)
        tell = partial(data_party.tell, self)
        made = data_party.remember(
            self,
            public_texts,
            lambda: {"sets": partition_by_distance(vocabulary, order, self.size, tell=tell)},
            words=vocabulary.digest,
        )
        self._sets = made["sets"]

    def on_text(self, fields: dict[str, str]) -> dict[str, str]:
        if math.isinf(self.epsilon):
            return fields
        return {k: substitute(v, self._replaced, spacing=self.spacing) for k, v in fields.items()}

    def _replaced(self, word: str) -> str:
        vocabulary, generator = ready(self, self._vocabulary, self._generator)
        number = vocabulary.index.get(word)
        self.tally["words"] += 1
        if self.stop_words and word.lower() in STOP_WORDS:
            self.tally["stop words kept"] += 1
            return word
        if number is None:
            self.tally["unknown"] += 1
            return word
        among, scores = within_set(number, vocabulary, self._sets, self.epsilon)
        return vocabulary.words[int(among[draw(scores, generator)])]

    def replacement(
        self, tokenizer: Any, embeddings: Tensor, public_texts: Sequence[str]
    ) -> Replacement | None:
        if math.isinf(self.epsilon):
            return None
        vocabulary = vocabulary_of("CusText", self.vectors, tokenizer, embeddings)
        order = vocabulary.by_frequency(public_texts)
        sets = partition_by_distance(vocabulary, order, self.size)
        kept = STOP_WORDS if self.stop_words else frozenset[str]()
        return WithinSets(vocabulary.words, vocabulary, sets, self.epsilon, kept)

    def guarantee(
        self, releases: int, messages: int = 0, gradients: int | None = None
    ) -> Guarantee:
        """ε between words of one set, infinite between sets: nothing for a text as a whole."""
        if math.isinf(self.epsilon) or self.spacing or self.stop_words:
            return Guarantee()
        return Guarantee(
            mechanism="exponential mechanism within sets of words",
            adjacency="replace words of one example; a replacement within a set costs epsilon_per_release, others have no bound",
            delta=0.0,
            epsilon_per_release=self.epsilon,
            releases=releases,
            epsilon=math.inf,
            excluded="the set of each word, words outside the vocabulary (in clear), answers, labels and gradients",
            randomness="the data party's torch generator: from the operating system unless seeded",
        )


def within_set(
    number: int, vocabulary: Vocabulary, sets: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Return the words of the set of a word and the logarithms, up to a constant, of their probabilities: (K,) each."""
    among = (sets == sets[number]).nonzero().flatten()
    nearness = -vocabulary.distances(number, among)
    low, high = nearness.min(), nearness.max()
    scaled = (nearness - low) / (high - low) if high > low else torch.ones_like(nearness)
    return among, 0.5 * epsilon * scaled


@frozen(eq=False)
class WithinSets(Replacement):
    """The replacement of a word within its set, and of stop words by themselves."""

    words: Sequence[str]
    vocabulary: Vocabulary
    sets: Tensor  # (V,)
    epsilon: float
    kept: frozenset[str]

    def log_probabilities(self, numbers: Tensor) -> Tensor:
        said = torch.full((len(numbers), len(self.words)), -math.inf)
        for row, number in enumerate(numbers.tolist()):
            if self.words[number].lower() in self.kept:
                said[row, number] = 0.0
                continue
            among, scores = within_set(number, self.vocabulary, self.sets, self.epsilon)
            said[row, among] = scores.log_softmax(0)
        return said


def custext_plus(
    *, epsilon: float = 1.0, size: int = 20, vectors: str = "", spacing: bool = True
) -> CusText:
    """CusText+: English function words stay as they are, in clear, for better text; no guarantee.

    The same paper, §3.3. See `CusText` for the options.
    """
    return CusText(epsilon, size, vectors, spacing, stop_words=True)
