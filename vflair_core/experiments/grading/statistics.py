"""The measures that grades are made of: rates with their intervals, AUC, sequences, bags."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from attrs import frozen
from torch import Tensor

from vflair_core.errors import AttackError

LEVEL = 0.95  # of all intervals
RESAMPLES = 2000
Hits = Sequence[tuple[int, int]]  # (right, of how many), for each sentence


def pooled(hits: Hits) -> float:
    """Return the rate over all sentences together."""
    return sum(h for h, _ in hits) / max(sum(n for _, n in hits), 1)


@frozen
class Floor:
    """What guesses reach that use no message of the example, on the very victims that are graded.

    `right` has how much of each victim, or update, is right in all `guesses` together.
    """

    right: tuple[int, ...]
    guesses: int = 1

    @classmethod
    def over(cls, guesses: Sequence[Hits], size: int = 1) -> Floor:
        """Of several guesses, each with its hits by victim; `size` victims share an update."""
        if not guesses:
            return cls(())
        each = zip(*([right for right, _ in hits] for hits in guesses), strict=True)
        sums = [sum(column) for column in each]
        return cls(tuple(sum(sums[n : n + size]) for n in range(0, len(sums), size)), len(guesses))

    def rate(self, count: int) -> float:
        """The mean share of `count` private positions, labels or candidates."""
        return sum(self.right) / (self.guesses * max(count, 1))


def chance_of_no_more(hits: Hits, floor: Floor) -> float:
    """Return the probability of as large an advantage over the floor if there were none: paired, one-sided.

    Exact if under that hypothesis each victim's (or update's) difference is as likely to be against the attack as for it; a
    victim's positions are right and wrong together (Fisher's randomisation test of matched pairs, 1935).
    """
    right = floor.right or (0,) * len(hits)
    gaps = [h * floor.guesses - f for (h, _), f in zip(hits, right, strict=True)]
    sizes = [abs(gap) for gap in gaps if gap]
    unit = math.gcd(*sizes) if sizes else 1
    reach = sum(sizes) // unit
    likely = torch.zeros(2 * reach + 1, dtype=torch.float64)  # of each sum, from -reach
    likely[reach] = 1.0
    for size in sizes:
        step = size // unit
        likely = (likely.roll(step) + likely.roll(-step)) / 2
    return float(likely[reach + sum(gaps) // unit :].sum())


def interval(hits: Hits) -> tuple[float, float]:
    """Return the 95 % interval of the pooled accuracy: bootstrap over sentences, exact binomial at 0 and 1."""
    total, count = sum(h for h, _ in hits), sum(n for _, n in hits)
    if not count:
        return 0.0, 1.0
    tail = (1 - LEVEL) / 2
    sentences = len(hits)
    if total == 0:
        return 0.0, 1 - tail ** (1 / sentences)
    if total == count:
        return tail ** (1 / sentences), 1.0
    draws = torch.randint(
        sentences, (RESAMPLES, sentences), generator=torch.Generator().manual_seed(0)
    )
    return middle(resampled_rates(hits, draws))


def resampled_rates(hits: Hits, drawn: Tensor) -> Tensor:
    """Return the rate in each resample (R,) of the sentences `drawn` (R, N)."""
    sums = torch.tensor(hits, dtype=torch.float64)[drawn].sum(1)  # (R, 2)
    return sums[:, 0] / sums[:, 1].clamp_min(1)


def middle(draws: Tensor) -> tuple[float, float]:
    """Return the bounds between which 95 % of `draws` (R,) lie."""
    ranked, tail = draws.sort().values, (1 - LEVEL) / 2
    low, high = round(tail * RESAMPLES), round((1 - tail) * RESAMPLES) - 1
    return float(ranked[low]), float(ranked[high])


def bag_overlap(guessed: Tensor, true: Tensor) -> tuple[float, float]:
    """Order ignored, as VFLAIR-LLM measures: recall over true tokens, precision over guessed ones."""
    wanted, said = set(true.tolist()), set(guessed.tolist())
    recall = sum(t in said for t in true.tolist()) / max(len(true), 1)
    precision = sum(g in wanted for g in guessed.tolist()) / max(len(guessed), 1)
    return recall, precision


def longest_common_subsequence(guessed: Sequence[int], true: Sequence[int]) -> int:
    """Length of the longest common subsequence, 64 and more columns at a time (Hyyrö, 2004)."""
    places: dict[int, int] = {}
    for n, t in enumerate(true):
        places[t] = places.get(t, 0) | 1 << n
    every = (1 << len(true)) - 1
    left = every  # a zero bit for each column in which the subsequence has grown
    for g in guessed:
        met = left & places.get(g, 0)
        left = (left + met | left - met) & every
    return len(true) - left.bit_count()


def rouge_l(guessed: Sequence[int], true: Sequence[int]) -> float:
    """F1 of the longest common subsequence of two token sequences (Lin, 2004)."""
    if not guessed or not true:
        return 0.0
    return 2 * longest_common_subsequence(guessed, true) / (len(guessed) + len(true))


def auc(scores: Tensor, labels: Tensor) -> float:
    """Probability that an example of class 1 scores above one of class 0; ties count half."""
    positive, negative = scores[labels == 1], scores[labels == 0]
    if not len(positive) or not len(negative):
        raise AttackError("AUC needs victims of both classes.")
    above = (positive[:, None] > negative).double() + 0.5 * (positive[:, None] == negative).double()
    return float(above.mean())


def auc_either(scores: Tensor, labels: Tensor, permutations: int = 1000) -> tuple[float, float]:
    """Return max(AUC, 1 − AUC), and what 95 % of label permutations stay below: more than a half."""
    generator = torch.Generator().manual_seed(0)
    observed = auc(scores, labels)
    drawn = [
        auc(scores, labels[torch.randperm(len(labels), generator=generator)])
        for _ in range(permutations)
    ]
    null = torch.tensor([max(a, 1 - a) for a in drawn])
    return max(observed, 1 - observed), float(null.quantile(LEVEL))
