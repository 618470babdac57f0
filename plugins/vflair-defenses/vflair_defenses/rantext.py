"""Replace words by random neighbours within a random radius, and repair the answer with a small local model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from attrs import define, field, frozen, validators
from torch import Tensor

from vflair_core import Defense, DefenseError, Replacement
from vflair_defenses.neighbours import (
    Vocabulary,
    draw,
    located,
    read_vocabulary,
    substitute,
    vocabulary_of,
)
from vflair_defenses.santext import SUPPORTED, ready

if TYPE_CHECKING:
    from vflair_core import Party

REQUEST = (
    "A text and a draft of what follows it. The draft continues a disturbed copy of the text. Keep what fits, "
    "and continue the text.\n\nText: {prompt}\n\nDraft: {answer}\n\nContinuation:"
)


@define(slots=False)
class RanText(Defense):
    """Draw a radius r from noise on the word's vector, and replace the word by one within r, ∝ exp(ε(r − d)/(2r)).

    Tong et al., "InferDPT: Privacy-preserving Inference for Black-box Large Language Models", arXiv 2310.12214: r is
    the length of Laplace noise with scale Δⱼ/f(ε) in coordinate j, Δⱼ the range of the vocabulary there, f(ε) = ε
    below 2 and 0.0166·ln(19.06ε − 38.13) + 9.311 above (the authors' fit). With `extractor`, a language model on
    the data party's disk rewrites the answer beside the true prompt, as in the paper. A word outside the vocabulary
    is dropped, and counted. The paper claims ε-LDP for a word; the noise hardly changes above ε = 2 and the
    candidates depend on the word, so we promise nothing. Differs from VFLAIR-LLM, which searches descending cosines
    as if they were ascending distances.

    Attributes:
        epsilon: ε of the paper; inf changes nothing.
        vectors: File of public word vectors; empty takes the model's embeddings.
        spacing: Keep the characters between words.
        extractor: Folder of a causal language model with its tokenizer; empty leaves answers as they are.
        new_tokens: Most tokens that the extractor writes.
    """

    epsilon: float = field(default=6.0, validator=validators.gt(0))
    vectors: str = field(default="", converter=located)
    spacing: bool = False
    extractor: str = ""
    new_tokens: int = field(default=64, validator=validators.ge(1))
    tally: Counter[str] = field(init=False, factory=Counter, eq=False)
    _vocabulary: Vocabulary | None = field(init=False, default=None, eq=False)
    _generator: torch.Generator | None = field(init=False, default=None, eq=False)
    _ranges: Tensor = field(init=False, factory=lambda: torch.empty(0), eq=False)
    _model: Any = field(init=False, default=None, eq=False)

    covers = frozenset({"prompt"})
    supports = SUPPORTED

    def prepare(self, public_texts: Sequence[str], data_party: Party) -> None:
        """Read the words, the range of each coordinate, and the extractor."""
        self._vocabulary = read_vocabulary("RanText", self.vectors, data_party)
        self._generator = data_party.defenses.generator_of(self)
        vectors = self._vocabulary.vectors
        self._ranges = vectors.max(0).values - vectors.min(0).values
        if self.extractor:
            from transformers import AutoModelForCausalLM, AutoTokenizer

            model = AutoModelForCausalLM.from_pretrained(self.extractor).eval()
            self._model = (model, AutoTokenizer.from_pretrained(self.extractor))

    def on_text(self, fields: dict[str, str]) -> dict[str, str]:
        if math.isinf(self.epsilon):
            return fields
        return {k: substitute(v, self._replaced, spacing=self.spacing) for k, v in fields.items()}

    def _replaced(self, word: str) -> str | None:
        vocabulary, generator = ready(self, self._vocabulary, self._generator)
        number = vocabulary.index.get(word)
        self.tally["words"] += 1
        if number is None:
            self.tally["unknown"] += 1
            return None
        size = torch.empty(self._ranges.shape).exponential_(generator=generator)
        radius = float((size * self._ranges / noise_divisor(self.epsilon)).norm())
        distances = vocabulary.distances(number)
        near = (distances <= radius).nonzero().flatten()  # the word itself, at least
        scores = 0.5 * self.epsilon * (radius - distances[near]) / radius
        return vocabulary.words[int(near[draw(scores, generator)])]

    def replacement(
        self, tokenizer: Any, embeddings: Tensor, public_texts: Sequence[str]
    ) -> Replacement | None:
        if math.isinf(self.epsilon):
            return None
        vocabulary = vocabulary_of("RanText", self.vectors, tokenizer, embeddings)
        return WithinRadius(vocabulary.words, vocabulary.vectors, self.epsilon)

    def on_answer(self, prompt: str, answer: str) -> str:
        if not self.extractor:
            return answer
        if self._model is None:
            raise DefenseError(
                "RanText has no extractor yet: call prepare(public_texts, data_party) first."
            )
        model, tokenizer = self._model
        batch = tokenizer(REQUEST.format(prompt=prompt, answer=answer), return_tensors="pt")
        asked = {name: batch[name] for name in ("input_ids", "attention_mask")}
        written = model.generate(
            **asked,
            max_new_tokens=self.new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )
        extracted: str = tokenizer.decode(
            written[0, asked["input_ids"].shape[1] :], skip_special_tokens=True
        )
        return extracted


@frozen(eq=False)
class WithinRadius(Replacement):
    """The replacement of a word by one within a random radius: the mean over radii that are drawn once."""

    words: Sequence[str]
    vectors: Tensor  # (V, D)
    epsilon: float
    draws: int = 64

    def log_probabilities(self, numbers: Tensor) -> Tensor:
        own = self.vectors[numbers]
        away = torch.cdist(own, self.vectors, compute_mode="donot_use_mm_for_euclid_dist")
        said = torch.zeros_like(away)
        for radius in self._radii():
            scores = 0.5 * self.epsilon * (radius - away) / radius
            said += scores.masked_fill(away > radius, -math.inf).softmax(1)
        return (said / self.draws).log()

    def _radii(self) -> list[float]:
        ranges = self.vectors.max(0).values - self.vectors.min(0).values
        stream = torch.Generator().manual_seed(0)
        sizes = torch.empty(self.draws, len(ranges)).exponential_(generator=stream)
        return (sizes * ranges / noise_divisor(self.epsilon)).norm(dim=1).tolist()


def noise_divisor(epsilon: float) -> float:
    """f(ε): the scale of the noise in coordinate j is Δⱼ / f(ε)."""
    argument = 19.06 * epsilon - 38.13
    return epsilon if epsilon < 2 or argument <= 0 else 0.0166 * math.log(argument) + 9.311
