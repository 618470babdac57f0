"""Replace words by words that are near: all of them (SanText), or the rare ones (SanText+)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from attrs import define, field, frozen, validators
from torch import Tensor

from vflair_core import Defense, DefenseError, Guarantee, Replacement
from vflair_defenses.d_chi import metric_guarantee, spread_of
from vflair_defenses.neighbours import (
    Vocabulary,
    draw,
    located,
    read_vocabulary,
    substitute,
    vocabulary_of,
)

if TYPE_CHECKING:
    from vflair_core import Party

SUPPORTED = frozenset({("*", "*", "*")})  # of an answer in a passage the place follows its words


@define(slots=False)
class SanText(Defense):
    """Replace each word x by y with probability ∝ exp(−ε·d(x, y)/2), d the distance of their vectors.

    Yue et al., "Differential Privacy for Text Analytics via Natural Text Sanitization", Findings of ACL 2021, arXiv
    2106.01221. A unit is a pre-token, its vocabulary the model's whole-word tokens; a word outside it is replaced
    uniformly, and counted. Two words cost ε·d: the promise depends on how far they are. What is learnt is the
    sanitised text. Differs from VFLAIR-LLM, which joins word pieces with spaces and so breaks text at any ε.

    Attributes:
        epsilon: ε per unit of distance; inf changes nothing.
        vectors: File of public word vectors; empty takes the model's embeddings.
        spacing: Keep the characters between words, which lies outside the promise.
    """

    epsilon: float = field(default=1.0, validator=validators.ge(0))
    vectors: str = field(default="", converter=located)
    spacing: bool = False
    tally: Counter[str] = field(init=False, factory=Counter, eq=False)
    _vocabulary: Vocabulary | None = field(init=False, default=None, eq=False)
    _generator: torch.Generator | None = field(init=False, default=None, eq=False)
    _spread: tuple[float, float] = field(init=False, default=(0.0, 0.0))

    covers = frozenset({"prompt"})
    supports = SUPPORTED

    def prepare(self, public_texts: Sequence[str], data_party: Party) -> None:
        """Read the words and how far apart they are."""
        self._vocabulary = read_vocabulary(type(self).__name__, self.vectors, data_party)
        self._generator = data_party.defenses.generator_of(self)
        self._spread = spread_of(self._vocabulary.vectors)

    def on_text(self, fields: dict[str, str]) -> dict[str, str]:
        if math.isinf(self.epsilon):
            return fields
        return {k: substitute(v, self._replaced, spacing=self.spacing) for k, v in fields.items()}

    def _replaced(self, word: str) -> str:
        vocabulary, generator = ready(self, self._vocabulary, self._generator)
        return nearby(word, vocabulary, None, self.epsilon, generator, self.tally)

    def replacement(
        self, tokenizer: Any, embeddings: Tensor, public_texts: Sequence[str]
    ) -> Replacement | None:
        if math.isinf(self.epsilon):
            return None
        vocabulary = vocabulary_of("SanText", self.vectors, tokenizer, embeddings)
        return NearWords(vocabulary.words, vocabulary.vectors, self.epsilon)

    def guarantee(
        self, releases: int, messages: int = 0, gradients: int | None = None
    ) -> Guarantee:
        """One word is one release; there are no more words than rows."""
        ready(self, self._vocabulary, self._generator)
        if self.spacing:
            return Guarantee()
        return metric_guarantee(
            "words (exponential mechanism)", self.epsilon, *self._spread, releases,
            "the number of words, answers and labels",
        )  # fmt: skip


@define(slots=False)
class SanTextPlus(Defense):
    """Replace sensitive words, the rare ones, always, and others with probability p; by sensitive words only.

    The same paper, §4.3 (SanText+). Words that are not sensitive stay as they are with probability 1 − p: whoever
    reads them reads the truth, so there is no guarantee here (the paper's is for sensitive words only).

    Attributes:
        epsilon: ε per unit of distance; inf changes nothing.
        sensitive: Share of the vocabulary that is sensitive: the rarest words in public text.
        replaced: p, the probability that another word is replaced.
        vectors: File of public word vectors; empty takes the model's embeddings.
        spacing: Keep the characters between words.
    """

    epsilon: float = field(default=1.0, validator=validators.ge(0))
    sensitive: float = field(default=0.5, validator=[validators.gt(0), validators.le(1)])
    replaced: float = field(default=0.2, validator=[validators.ge(0), validators.le(1)])
    vectors: str = field(default="", converter=located)
    spacing: bool = True
    tally: Counter[str] = field(init=False, factory=Counter, eq=False)
    _vocabulary: Vocabulary | None = field(init=False, default=None, eq=False)
    _generator: torch.Generator | None = field(init=False, default=None, eq=False)
    _rare: Tensor = field(init=False, factory=lambda: torch.empty(0, dtype=torch.int64), eq=False)
    _is_rare: set[int] = field(init=False, factory=set, eq=False)

    covers = frozenset({"prompt"})
    supports = SUPPORTED

    def prepare(self, public_texts: Sequence[str], data_party: Party) -> None:
        """Read the words and which of them are rare in public text."""
        self._vocabulary = read_vocabulary(type(self).__name__, self.vectors, data_party)
        self._generator = data_party.defenses.generator_of(self)
        self._rare = self._rarest(self._vocabulary, public_texts)
        self._is_rare = set(self._rare.tolist())

    def on_text(self, fields: dict[str, str]) -> dict[str, str]:
        if math.isinf(self.epsilon):
            return fields
        return {k: substitute(v, self._replaced, spacing=self.spacing) for k, v in fields.items()}

    def _replaced(self, word: str) -> str:
        vocabulary, generator = ready(self, self._vocabulary, self._generator)
        number = vocabulary.index.get(word)
        common = number is not None and number not in self._is_rare
        if common and float(torch.rand((), generator=generator)) >= self.replaced:
            self.tally["kept"] += 1
            return word
        return nearby(word, vocabulary, self._rare, self.epsilon, generator, self.tally)

    def _rarest(self, vocabulary: Vocabulary, public_texts: Sequence[str]) -> Tensor:
        order = vocabulary.by_frequency(public_texts)
        return order[len(order) - math.ceil(self.sensitive * len(order)) :]

    def replacement(
        self, tokenizer: Any, embeddings: Tensor, public_texts: Sequence[str]
    ) -> Replacement | None:
        if math.isinf(self.epsilon):
            return None
        vocabulary = vocabulary_of("SanTextPlus", self.vectors, tokenizer, embeddings)
        rare = self._rarest(vocabulary, public_texts)
        return NearWords(vocabulary.words, vocabulary.vectors, self.epsilon, rare, self.replaced)


@frozen(eq=False)
class NearWords(Replacement):
    """The replacement of a word by one that is near, among the rare ones if only those are sensitive."""

    words: Sequence[str]
    vectors: Tensor  # (V, D)
    epsilon: float
    rare: Tensor | None = None  # (R,)
    replaced: float = 1.0  # of a word that is not rare

    def log_probabilities(self, numbers: Tensor) -> Tensor:
        among = torch.arange(len(self.words)) if self.rare is None else self.rare
        own, others = self.vectors[numbers], self.vectors[among]
        away = torch.cdist(own, others, compute_mode="donot_use_mm_for_euclid_dist")
        said = torch.zeros(len(numbers), len(self.words))
        said[:, among] = (-0.5 * self.epsilon * away).softmax(1)
        common = ~torch.isin(numbers, among)
        said[common] *= self.replaced
        said[common, numbers[common]] += 1 - self.replaced
        return said.log()


def ready(
    defense: Defense, vocabulary: Vocabulary | None, generator: torch.Generator | None
) -> tuple[Vocabulary, torch.Generator]:
    """Return both, if `prepare` has run.

    Raises:
        DefenseError: It has not.
    """
    if vocabulary is None or generator is None:
        raise DefenseError(
            f"{type(defense).__name__} has no words yet: call prepare(public_texts, data_party) first."
        )
    return vocabulary, generator


def nearby(
    word: str,
    vocabulary: Vocabulary,
    among: Tensor | None,
    epsilon: float,
    generator: torch.Generator,
    tally: Counter[str],
) -> str:
    """Draw a word with probability ∝ exp(−ε·d/2) from those `among`; for an unknown word, uniformly."""
    number = vocabulary.index.get(word)
    tally["words"] += 1
    if number is None:
        tally["unknown"] += 1
        count = len(vocabulary.words) if among is None else len(among)
        chosen = int(torch.randint(count, (), generator=generator))
    else:
        chosen = draw(-0.5 * epsilon * vocabulary.distances(number, among), generator)
    return vocabulary.words[chosen if among is None else int(among[chosen])]
