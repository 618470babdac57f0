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
from vflair_core import WORD, Guess, Head

Progress = Callable[..., None]
UNKNOWN = -1  # a word that the defense does not know: it is as it was


@frozen
class ReplacementInversion:
    """Take for each word the one that is likeliest behind it: P(words | sent) ∝ ∏ᵢ P(sentᵢ | wordᵢ) · P(wordᵢ | wordᵢ₋₁).

    Ours: Bayes' rule with the defense's own probabilities of replacement, where the papers of these defenses (arXiv 2106.01221, 2207.01193)
    ask a language model for a word that was masked. The prior is counted in public text, single words mixed with pairs; each word's
    posterior comes of the forward–backward algorithm. The tokens that were sent are found first: by vocabulary-search in a causal
    head, by coordinate-search in another, else by nearest-embedding. Without a known replacement they are the guess. Each release is
    read by itself, and the likelihoods of its words add up. An answer, which no defense of words changes, is left alone where the gradient shows it.

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
        hidden_grad: Tensor | None = None,  # (N, T, D)
        task_kind: str = "",
        device: torch.device | str = "cpu",
        progress: Progress = lambda *_: None,
    ) -> Guess:
        """Return the tokens (N, T) of every example, of the text before words were replaced."""
        if replacement is None:  # all releases are of one text
            return self._read(
                smashed, releases, mask, lengths, embeddings, generator, head, mechanism, parameters, device, progress
            )  # fmt: skip
        readings, spent = [], 0.0
        for release in releases:  # words are drawn anew for each, and so is their number of tokens
            real = release.abs().amax(-1) > 0
            real[:, 0] = True
            guess = self._read(
                release, release[None], real, real.sum(1), embeddings, generator, head, mechanism, parameters, device, progress
            )  # fmt: skip
            assert guess.tokens is not None  # all three searches guess tokens
            readings.append(guess.tokens)
            spent += (guess.budget or {}).get("forwards", 0)
        tokens = self._inverted(readings, _answers_at(hidden_grad, lengths, task_kind), tokenizer, replacement, public_texts)  # fmt: skip
        return Guess(tokens=tokens, budget={"forwards": spent})

    def _read(
        self, smashed: Tensor, releases: Tensor, mask: Tensor, lengths: Tensor, embeddings: Tensor, generator: torch.Generator,
        head: Head | None, mechanism: Any, parameters: Any, device: torch.device | str, progress: Progress,
    ) -> Guess:  # fmt: skip
        """Find the tokens that were sent."""
        if head is None:
            return NearestEmbedding()(smashed, mask, embeddings, device)
        if head.is_causal():
            return VocabularySearch(beam=self.beam)(
                releases, lengths, head, mechanism, parameters, progress=progress
            )
        search = CoordinateSearch(candidates=self.tried, sweeps=self.sweeps)
        return search(
            releases, mask, head, generator, mechanism=mechanism, parameters=parameters, progress=progress
        )  # fmt: skip

    def _inverted(
        self, readings: Sequence[Tensor], answers: Sequence[int], tokenizer: Any, replacement: Any, public_texts: Sequence[str],
    ) -> Tensor:  # fmt: skip
        """Return the tokens (N, T) with the words before the answer put back; special tokens around them and the answer stay."""
        special, first = set(tokenizer.all_special_ids), readings[0]
        texts: list[list[str]] = []
        around = []
        for n, answer in enumerate(answers):
            texts.append([])
            for reading in readings:
                ids = reading[n][reading[n] >= 0].tolist()
                prompt = ids[:answer] if answer else ids
                texts[-1].append(tokenizer.decode(prompt, skip_special_tokens=True))
                if reading is first:
                    left = next((k for k, i in enumerate(prompt) if i not in special), len(prompt))
                    right = next((k for k, i in enumerate(prompt[::-1]) if i not in special), 0)
                    around.append((ids[:left], ids[len(prompt) - right :]))
        found = self.before([each[0] for each in texts], replacement, public_texts, [each[1:] for each in texts])  # fmt: skip
        tokens = torch.full_like(first, -1)
        for n, (text, (begin, end)) in enumerate(zip(found, around, strict=True)):
            ids = [*begin, *tokenizer(text, add_special_tokens=False)["input_ids"], *end]
            tokens[n, : len(ids)] = torch.tensor(ids, dtype=torch.long)[: tokens.shape[1]]
        return tokens

    def before(
        self,
        texts: Sequence[str],
        replacement: Any,
        public_texts: Sequence[str],
        others: Sequence[Sequence[str]] = (),
    ) -> list[str]:
        """Return the texts with each known word replaced by the likeliest one behind it.

        `others` are more releases of each text, with words drawn anew; of those with as many words all likelihoods add up.
        """
        index = {word: number for number, word in enumerate(replacement.words)}
        spans = [list(WORD.finditer(text)) for text in texts]
        sent = [[[index.get(m.group(), UNKNOWN) for m in row]] for row in spans]
        for rows, more in zip(sent, others or [()] * len(texts), strict=True):
            again = [[index.get(word, UNKNOWN) for word in WORD.findall(text)] for text in more]
            rows += [row for row in again if len(row) == len(rows[0])]
        seen = sorted({word for rows in sent for row in rows for word in row} - {UNKNOWN})
        said, column = said_of(replacement, seen), {word: n for n, word in enumerate(seen)}
        prior = WordPairs(index, public_texts)
        made = []
        for text, rows, places in zip(texts, sent, spans, strict=True):
            options, scores = [], []
            for words in zip(*rows, strict=True):
                columns = [column[word] for word in words if word != UNKNOWN]
                option, score = self._behind(said[:, columns].sum(1), prior, words[0])
                options.append(option)
                scores.append(score)
            chosen = posterior(options, scores, prior)
            pieces, end = "", 0
            for place, number in zip(places, chosen, strict=True):
                word = place.group() if number == UNKNOWN else replacement.words[number]
                pieces += text[end : place.start()] + word
                end = place.end()
            made.append(pieces + text[end:])
        return made

    def _behind(self, said: Tensor, prior: WordPairs, word: int) -> tuple[Tensor, Tensor]:
        """The words that could be behind a place, (K,), and what each makes likely there; `said` is of all words, (V,).

        A word that the defense does not know, or that nothing explains (it was misread), stays as it is.
        """
        best = (said + prior.single[:-1].log()).topk(min(self.candidates, len(said)))
        option = best.indices[best.values.isfinite()]
        if word == UNKNOWN or not len(option):
            return torch.tensor([word]), torch.zeros(1)
        return option, said[option]


def _answers_at(hidden_grad: Tensor | None, lengths: Tensor, task_kind: str) -> list[int]:
    """Where the answer of each text begins, which no defense of words changes; 0 where it cannot be told.

    The gradient shows it where no block of the tail mixes rows: a prompt's are zero, and the label of row t is token t + 1.
    """
    if hidden_grad is None or hidden_grad.dim() != 3 or task_kind != "causal-lm":
        return [0] * len(lengths)
    learns = hidden_grad.norm(dim=2) > 0  # (N, T)
    first = learns.long().argmax(1)
    return [int(at) + 1 if at > 0 else 0 for at in first]


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
        single = torch.full(
            (len(index) + 1,), 0.5
        )  # the last one is of all words that are not known
        self.count: Counter[tuple[int, int]] = Counter()
        self.first: Counter[int] = Counter()
        for text in texts:
            words = [word for word, _ in itertools.groupby(WORD.findall(text))]
            row = [index.get(word, UNKNOWN) for word in words]
            for word in row:
                single[word] += 1
            self.count.update(itertools.pairwise(row))
            self.first.update(row[:-1])
        self.followers = Counter(first for first, _ in self.count)
        self.single = single / single.sum()  # (V + 1,)

    def after(self, before: Tensor, words: Tensor) -> Tensor:
        """Return log P(word | word before) for some words before and some words: (K,), (L,) -> (K, L)."""
        single, rows = self.single[words], []
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
    start = prior.single[options[0]].log()
    steps = [prior.after(a, b) for a, b in itertools.pairwise(options)]
    forward = [start + scores[0]]
    for step, own in zip(steps, scores[1:], strict=True):
        forward.append((forward[-1][:, None] + step).logsumexp(0) + own)
    backward = [torch.zeros(len(options[-1]))]
    for step, own in zip(reversed(steps), reversed(scores[1:]), strict=True):
        backward.append((step + (own + backward[-1])[None]).logsumexp(1))
    both = zip(options, forward, reversed(backward), strict=True)
    return [int(words[(ahead + behind).argmax()]) for words, ahead, behind in both]
