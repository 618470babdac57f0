"""Words with vectors, and how far they are from each other: what the defenses on text choose from.

A unit is a pre-token: a run of letters and digits, or a single sign. By default the vocabulary is the model's own
tokens that are whole words, with its own embeddings, both of which the model party has anyway; a file of public
word vectors does as well. No table of all pairs is kept: 50,000 words would take 10 GB.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from attrs import field, frozen
from torch import Tensor

from vflair_core import WORD, DefenseError, Replaced, Span

if TYPE_CHECKING:
    from vflair_core import Party

FIRST_WORDS = 256  # of sets that are looked for at once: 50 MB of scores for 50,000 words


@frozen(eq=False)
class Vocabulary:
    """Words and their vectors (V, D)."""

    words: tuple[str, ...]
    vectors: Tensor
    index: dict[str, int] = field(init=False)

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "index", {word: n for n, word in enumerate(self.words)})

    @property
    def digest(self) -> str:
        """Names the words and vectors."""
        found = hashlib.sha256("\0".join(self.words).encode())
        found.update(self.vectors.contiguous().numpy().tobytes())
        return found.hexdigest()

    def distances(
        self, word: int, among: Tensor | None = None
    ) -> Tensor:  # -> (V,) or (len(among),)
        """Return the Euclidean distances of one word to all, or to those `among`; to itself exactly 0."""
        others = self.vectors if among is None else self.vectors[among]
        # By differences and without a table of them: products would leave near words off by rounding.
        own = self.vectors[word : word + 1]
        return torch.cdist(own, others, compute_mode="donot_use_mm_for_euclid_dist")[0]

    def by_frequency(self, texts: Sequence[str]) -> Tensor:  # -> (V,)
        """Return the numbers of all words, the most frequent in public text first; ties keep their order."""
        counts = Counter(word for text in texts for word in WORD.findall(text))
        return torch.tensor([-counts[word] for word in self.words]).argsort(stable=True)


def read_vocabulary(who: str, path: str, party: Party) -> Vocabulary:
    """Return the words of a file, or of the model if `path` is empty.

    Raises:
        DefenseError: There is no tokenizer, or no two words are left.
    """
    table: Any = party.model.get_input_embeddings()
    return vocabulary_of(who, path, party.tokenizer, table.weight)


def vocabulary_of(who: str, path: str, tokenizer: Any, embeddings: Tensor) -> Vocabulary:
    """Return the same of a tokenizer, None if there is none, and a table of embeddings (V, D)."""
    found = _of_file(Path(path)) if path else _of_model(who, tokenizer, embeddings)
    if len(found.words) < 2:
        raise DefenseError(
            f"{who} needs words to choose from, and {path or 'the tokenizer'} has {len(found.words)} whole ones. "
            "Give a file of word vectors: vectors = PATH, one word and its numbers a line."
        )
    return found


def _of_model(who: str, tokenizer: Any, embeddings: Tensor) -> Vocabulary:
    """Tokens that are whole words, as they are written after a space, else at the beginning."""
    if tokenizer is None:
        raise DefenseError(
            f"{who} changes words, which needs a tokenizer: split(..., tokenizer=...)."
        )
    size = min(len(tokenizer), len(embeddings))
    shown = tokenizer.batch_decode([[n] for n in range(size)])
    words = list(dict.fromkeys(w.strip() for w in shown if WORD.fullmatch(w.strip())))
    numbers: dict[str, int] = {}
    for form in (" {}", "{}"):
        left = [word for word in words if word not in numbers]
        if left:
            ids = tokenizer([form.format(w) for w in left], add_special_tokens=False)["input_ids"]
            numbers |= {w: i[0] for w, i in zip(left, ids, strict=True) if len(i) == 1}
    kept = [word for word in words if word in numbers]
    chosen = torch.tensor([numbers[w] for w in kept], device=embeddings.device)
    vectors = embeddings.detach()[chosen].float().cpu().clone()
    return Vocabulary(tuple(kept), vectors)


def _of_file(path: Path) -> Vocabulary:
    """Read the text form of word2vec and GloVe: a word and its numbers a line; a first line of sizes is skipped."""
    words: dict[str, Any] = {}
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            word, *values = line.rstrip().split(" ")
            if number == 1 and len(values) == 1:
                continue
            try:
                vector = np.array(values, dtype=np.float32)
            except ValueError as error:
                raise DefenseError(f"{path}, line {number}: {error}.") from error
            first = next(iter(words.values()), vector)
            if vector.shape != first.shape:
                raise DefenseError(
                    f"{path}, line {number}: {len(vector)} numbers, where the first word has {len(first)}."
                )
            if WORD.fullmatch(word):
                words.setdefault(word, vector)
    return Vocabulary(
        tuple(words),
        torch.from_numpy(np.stack(list(words.values()))) if words else torch.empty(0, 0),
    )


def located(path: str) -> str:
    """The path of a file of vectors from anywhere; an attacker who is told of it runs elsewhere."""
    return str(Path(path).absolute()) if path else ""


def substitute(text: str, replace: Callable[[str], str | None], *, spacing: bool) -> Replaced:
    """Replace each unit of `text`; None drops it. The result remembers where each word comes from.

    With `spacing` the characters between units stay as they are, which tells more than the promise covers; without,
    units are parted by one space.
    """
    made, pieces, end = "", list[tuple[Span, Span]](), 0
    for match in WORD.finditer(text):
        word = replace(match.group())
        if spacing:
            made += text[end : match.start()]
        elif made and word is not None:
            made += " "
        if word is not None:
            pieces.append((match.span(), (len(made), len(made) + len(word))))
            made += word
        end = match.end()
    return Replaced(made + text[end:] if spacing else made, pieces)


def draw(scores: Tensor, generator: torch.Generator) -> int:
    """Draw a number with probability ∝ exp(score): the Gumbel trick, which does not underflow."""
    noise = torch.empty(scores.shape).exponential_(generator=generator)
    return int((scores - noise.log()).argmax())


def partition_by_distance(
    vocabulary: Vocabulary,
    order: Tensor,
    size: int,
    *,
    tell: Callable[[int, int], None] = lambda *_: None,
) -> Tensor:
    """Part all words into sets: the first of `order` that is left, with its `size` − 1 nearest that are left.

    Words that are equally far stand as in `order`.

    Returns:
        The number of each word's set, (V,).
    """
    sets, vectors = np.full(len(vocabulary.words), -1), vocabulary.vectors.float()
    left, number, count = order.numpy(), 0, math.ceil(len(order) / size)
    while len(left):
        tell(number, count)
        pool = vectors[torch.from_numpy(left)]  # (L, D)
        squares, free = pool.square().sum(1), np.ones(len(left), dtype=bool)
        # One product serves many first words; by rounding it is off by less than error · (|x|² + |y|²).
        error = 2 * (pool.shape[1] + 4) * torch.finfo(torch.float32).eps
        scores = (1 - error) * squares - 2 * (pool[:FIRST_WORDS] @ pool.T)  # (firsts, L)
        lowest, slack = scores.numpy(), (error * squares).numpy()
        for first in range(len(lowest)):
            if free[first]:
                chosen = _nearest(pool.numpy(), first, lowest[first], slack, size)
                sets[left[chosen]] = number
                free[chosen] = False
                lowest[first + 1 :, chosen] = math.inf
                number += 1
        left = left[free]
    return torch.from_numpy(sets)


def _nearest(
    pool: np.ndarray, first: int, low: np.ndarray, slack: np.ndarray, size: int
) -> np.ndarray:  # -> (size,) or fewer
    """The first word and its `size` − 1 nearest of finite `low`: by exact distances of all that may be among them.

    Plain numpy: thousands of small operations of torch wait for each other's threads where the cores are busy.
    """
    some = np.argpartition(low, size - 1)[:size] if size < len(low) else np.arange(len(low))
    cut = (low[some] + 2 * slack[some]).max() + 2 * slack[first]
    others = np.flatnonzero((low <= cut) & (low < np.inf))
    near = np.append(first, others[others != first])  # itself before its equals
    distances = np.square(pool[near].astype(float) - pool[first].astype(float)).sum(1)
    return near[distances.argsort(kind="stable")[:size]]
