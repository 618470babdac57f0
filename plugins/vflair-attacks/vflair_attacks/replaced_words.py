"""Find the tokens that were sent, then the likeliest word behind each word: for defenses that replace words."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from attrs import field, frozen, validators
from torch import Tensor

from vflair_attacks.coordinate_search import CoordinateSearch
from vflair_attacks.nearest_embedding import NearestEmbedding
from vflair_attacks.vocabulary_search import VocabularySearch
from vflair_core import Guess
from vflair_core.halves import Head
from vflair_core.spans import WORD

Progress = Callable[..., None]
UNKNOWN = -1  # a word that the defense does not know: it is as it was


@frozen
class ReplacementInversion:
    """Take for each word the one that is likeliest behind it: P(words | sent) ∝ ∏ᵢ P(sentᵢ | wordᵢ) · P(wordᵢ | wordᵢ₋₁).

    Ours: Bayes' rule with the defense's own probabilities of replacement, where the papers of these defenses (arXiv 2106.01221, 2207.01193)
    ask a language model for a word that was masked. The prior is counted in public text, single words mixed with pairs; each word's
    posterior comes of the forward–backward algorithm. The tokens that were sent are found first: by vocabulary-search in a causal
    head, by coordinate-search in another, else by nearest-embedding. Without a known replacement they are the guess.

    Attributes:
        candidates: Words considered behind each word.
        tried: Tokens that coordinate-search tries at each position.
        sweeps: Most times it goes through all positions.
        beam: Hypotheses that vocabulary-search keeps.
    """

    candidates: int = field(default=64, validator=validators.ge(1))
    tried: int = field(default=64, validator=validators.ge(1))
    sweeps: int = field(default=4, validator=validators.ge(1))
    beam: int = field(default=4, validator=validators.ge(1))

    def __call__(
        self,
        smashed: Tensor,  # (N, T, D)
        releases: Tensor,  # (R, N, T, D)
        mask: Tensor,  # (N, T)
        lengths: Tensor,  # (N,)
        embeddings: Tensor,  # (V, D)
        tokenizer: Any,
        public_texts: Sequence[str],
        generator: torch.Generator,
        head: Head | None = None,
        mechanism: Any = None,
        parameters: Any = None,
        replacement: Any = None,
        device: torch.device | str = "cpu",
        progress: Progress = lambda *_: None,
    ) -> Guess:
        """Return the tokens (N, T) of every example, of the text before words were replaced."""
        if head is None:
            sent = NearestEmbedding()(smashed, mask, embeddings, device)
        elif head.is_causal():
            sent = VocabularySearch(beam=self.beam)(
                releases, lengths, head, mechanism, parameters, progress=progress
            )
        else:
            search = CoordinateSearch(candidates=self.tried, sweeps=self.sweeps)
            sent = search(
                releases, mask, head, generator, mechanism=mechanism, parameters=parameters, progress=progress
            )  # fmt: skip
        if replacement is None or sent.tokens is None:
            return sent
        texts = [
            tokenizer.decode(row[row >= 0].tolist(), skip_special_tokens=True)
            for row in sent.tokens
        ]
        found = self.before(texts, replacement, public_texts)
        tokens = torch.full_like(sent.tokens, -1)
        for row, text in enumerate(found):
            ids = tokenizer(text)["input_ids"][: tokens.shape[1]]
            tokens[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
        return Guess(tokens=tokens, budget=sent.budget)

    def before(
        self, texts: Sequence[str], replacement: Any, public_texts: Sequence[str]
    ) -> list[str]:
        """Return the texts with each known word replaced by the likeliest one behind it."""
        index = {word: number for number, word in enumerate(replacement.words)}
        spans = [list(WORD.finditer(text)) for text in texts]
        sent = [[index.get(m.group(), UNKNOWN) for m in row] for row in spans]
        seen = sorted({word for row in sent for word in row} - {UNKNOWN})
        said = said_of(replacement, seen)  # (V, S)
        prior = WordPairs(index, public_texts)
        likely = (said + prior.single.log()[:, None]).topk(min(self.candidates, len(said)), dim=0)
        behind = {
            word: likely.indices[likely.values[:, n].isfinite(), n] for n, word in enumerate(seen)
        }
        column = {word: n for n, word in enumerate(seen)}
        texts_before = []
        for text, row, places in zip(texts, sent, spans, strict=True):
            # A word that nothing explains was misread: it stays as it is, as an unknown one does.
            options = [
                behind[word] if word != UNKNOWN and len(behind[word]) else torch.tensor([word])
                for word in row
            ]
            scores = [
                said[some, column[word]]
                if word != UNKNOWN and len(behind[word])
                else torch.zeros(1)
                for word, some in zip(row, options, strict=True)
            ]
            chosen = posterior(options, scores, prior)
            made, end = "", 0
            for place, number in zip(places, chosen, strict=True):
                word = place.group() if number == UNKNOWN else replacement.words[number]
                made += text[end : place.start()] + word
                end = place.end()
            texts_before.append(made + text[end:])
        return texts_before


def said_of(replacement: Any, seen: Sequence[int], chunk: int = 256) -> Tensor:
    """Return log P(sent | word) of every word for the words that were seen: (V, S)."""
    numbers, columns = torch.arange(len(replacement.words)), torch.tensor(seen, dtype=torch.long)
    rows = [replacement.log_probabilities(some)[:, columns] for some in numbers.split(chunk)]
    return torch.cat(rows)


class WordPairs:
    """How likely words are in public text, each seen half a time more than it was: single ones, and after another.

    A row of the same word or sign, as lines are drawn with, counts once. Pairs and single words are mixed as Witten and Bell (1991, IEEE Trans. Information Theory 37.4) do: what was seen N times, before T
    different words, weighs pairs by N / (N + T).

    Args:
        index: The number of each word.
        texts: Public text.
    """

    def __init__(self, index: dict[str, int], texts: Sequence[str]) -> None:
        single = torch.full((len(index),), 0.5)
        self.count: Counter[tuple[int, int]] = Counter()
        self.first: Counter[int] = Counter()
        for text in texts:
            words = [word for word, _ in itertools.groupby(WORD.findall(text))]
            row = [index.get(word, UNKNOWN) for word in words]
            for word in row:
                if word != UNKNOWN:
                    single[word] += 1
            self.count.update(itertools.pairwise(row))
            self.first.update(row[:-1])
        self.followers = Counter(first for first, _ in self.count)
        self.single = single / single.sum()  # (V,)

    def after(self, before: Tensor, words: Tensor) -> Tensor:
        """Return log P(word | word before) for some words before and some words: (K,), (L,) -> (K, L)."""
        single = torch.where(words >= 0, self.single[words.clamp_min(0)], 1.0)
        rows = []
        for one in before.tolist():
            counts = torch.tensor([float(self.count[one, word]) for word in words.tolist()])
            total, kinds = self.first[one], self.followers[one]
            rows.append((counts + kinds * single) / (total + kinds) if total else single)
        return torch.stack(rows).log()


def posterior(options: Sequence[Tensor], scores: Sequence[Tensor], prior: WordPairs) -> list[int]:
    """Return the word of each place with the largest posterior, by the forward–backward algorithm.

    Args:
        options: Numbers of the words that could be there, (K,) for each place.
        scores: log P(sent | word) of each of them, (K,).
        prior: Of the first word, and of each after the one before it.
    """
    if not options:
        return []
    first = options[0]
    start = torch.where(first >= 0, prior.single[first.clamp_min(0)], 1.0).log()
    steps = [prior.after(a, b) for a, b in itertools.pairwise(options)]
    forward = [start + scores[0]]
    for step, own in zip(steps, scores[1:], strict=True):
        forward.append((forward[-1][:, None] + step).logsumexp(0) + own)
    backward = [torch.zeros(len(options[-1]))]
    for step, own in zip(reversed(steps), reversed(scores[1:]), strict=True):
        backward.append((step + (own + backward[-1])[None]).logsumexp(1))
    both = zip(options, forward, reversed(backward), strict=True)
    return [int(words[(ahead + behind).argmax()]) for words, ahead, behind in both]
