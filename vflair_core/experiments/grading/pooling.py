"""An attack over several seeds: its rate, or how a defense changed it, with an interval that knows what belongs together.

Tokens of one victim are right and wrong together, and so are victims of one seed. Seeds are resampled, then victims; what
victims make seeds differ by is taken out of the first, so that it is not counted twice (Davison and Hinkley, "Bootstrap
Methods and their Application", 1997, section 3.8).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import attrs
import torch
from attrs import frozen
from torch import Tensor

from vflair_core.errors import AttackError
from vflair_core.experiments.grading.grades import Grade
from vflair_core.experiments.grading.statistics import (
    LEVEL,
    RESAMPLES,
    Hits,
    interval,
    middle,
    pooled,
    resampled_rates,
)

NORMAL = 1.959964  # within so many standard deviations lie 95 % of a normal distribution
FEW = 5  # seeds: with two, 95 % intervals held the truth in 83 % of simulated cases, with five in 92 % and more
ALONE = "one victim says nothing of others"
STUDENT = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)


@frozen
class Estimate:
    """A rate, or a change of one, over several seeds: each seed counts alike.

    Attributes:
        value: The mean over seeds of the pooled rate, or of its change.
        interval: 95 %, over other seeds and other victims.
        design_effect: The variance of `value` over what it would be if every token were right or wrong by itself; of a change, if both arms were independent too. None where it cannot be told.
        seeds: How many.
        victims: How many, or how many updates, in all seeds.
        tokens: How many positions, labels or candidates, in all seeds.
        note: What the interval does not say, or how it was made where resampling says nothing.
    """

    value: float
    interval: tuple[float, float]
    design_effect: float | None
    seeds: int
    victims: int
    tokens: int
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As plain values for a result."""
        return {**attrs.asdict(self), "interval": list(self.interval)}


def pooled_performance(grades: Sequence[Grade], *, same_victims: bool = False) -> Estimate:
    """Return the performance of one attack over several seeds: `grades` has its grade with each."""
    return over_cells([grade.hits for grade in grades], same_victims=same_victims)


def paired_change(
    before: Sequence[Grade], after: Sequence[Grade], *, same_victims: bool = False
) -> Estimate:
    """Return how the performance of one attack changed, `before` and `after` having its grade with each seed, in one order.

    Raises:
        AttackError: The seeds or victims of a pair do not match.
    """
    if len(before) != len(after):
        raise AttackError(f"{len(before)} seeds before and {len(after)} after are no pairs.")
    pairs = [(a.hits, b.hits) for a, b in zip(before, after, strict=True)]
    return paired_over_cells(pairs, same_victims=same_victims)


def over_cells(cells: Sequence[Hits], *, same_victims: bool = False) -> Estimate:
    """Return the rate over several seeds.

    Args:
        cells: For each seed what was right, of how many, of each victim.
        same_victims: The same texts were attacked with every seed, in the same order: they are then drawn together.

    Raises:
        AttackError: There is no seed, or seeds of the same victims differ in how many there are.
    """
    sizes, facts = _sizes(cells, same_victims=same_victims), _facts(cells)
    values = [pooled(hits) for hits in cells]
    value, clusters = _mean(values), sizes[0] if same_victims else sum(sizes)
    if not facts["tokens"]:
        return Estimate(value, (0.0, 1.0), None, **facts, note="nothing private was attacked")
    if value in (0.0, 1.0):
        end = rule_of_all(clusters)
        bounds = (0.0, 1 - end) if value == 0.0 else (end, 1.0)
        word = "none" if value == 0.0 else "all"
        note = f"{word} of it is right: exact binomial over {clusters} victims"
        return Estimate(value, bounds, None, **facts, note=note)
    if clusters == 1 and len(cells) == 1:
        return Estimate(value, (0.0, 1.0), None, **facts, note=ALONE)
    rates = [partial(resampled_rates, hits) for hits in cells]
    draws, variance = _resampled(rates, values, sizes, same_victims=same_victims)
    bounds = interval(cells[0]) if len(cells) == 1 else _within(draws, 0.0)
    spread = _mean([value * (1 - value) / max(_tokens(hits), 1) for hits in cells])
    effect = variance / (spread / len(cells))
    return Estimate(value, bounds, effect, **facts, note=_note(sizes))


def paired_over_cells(
    pairs: Sequence[tuple[Hits, Hits]], *, same_victims: bool = False
) -> Estimate:
    """Return the change of a rate over several seeds; a victim that is drawn is drawn before and after.

    Args:
        pairs: For each seed what was right before and after, victim by victim in the same order.
        same_victims: The same texts were attacked with every seed, in the same order: they are then drawn together.

    Raises:
        AttackError: There is no seed, or the victims of a pair do not match.
    """
    for before, after in pairs:
        if len(before) != len(after):
            raise AttackError(f"{len(before)} victims before and {len(after)} after are no pairs.")
    cells = [before for before, _ in pairs]
    sizes, facts = _sizes(cells, same_victims=same_victims), _facts(cells)
    rates = [(pooled(before), pooled(after)) for before, after in pairs]
    values = [after - before for before, after in rates]
    value, clusters = _mean(values), sizes[0] if same_victims else sum(sizes)
    if not facts["tokens"]:
        return Estimate(value, (-1.0, 1.0), None, **facts, note="nothing private was attacked")
    if (alike := _alike(pairs)) is not None:
        end = 1 - rule_of_all(clusters)  # at most so many victims change otherwise
        bounds = (max(alike - end, -1.0), min(alike + end, 1.0))
        note = f"every victim changed alike: exact binomial over {clusters} victims"
        return Estimate(value, bounds, None, **facts, note=note)
    if clusters == 1 and len(cells) == 1:
        return Estimate(value, (-1.0, 1.0), None, **facts, note=ALONE)
    changes = [partial(_changes, before, after) for before, after in pairs]
    draws, variance = _resampled(changes, values, sizes, same_victims=same_victims)
    spread = _mean(
        [
            sum(rate * (1 - rate) for rate in both) / max(_tokens(hits), 1)
            for both, hits in zip(rates, cells, strict=True)
        ]
    )
    effect = variance / (spread / len(cells)) if spread else None
    return Estimate(value, _within(draws, -1.0), effect, **facts, note=_note(sizes))


# -- how it is resampled --------------------------------------------------------------------------------------


def _resampled(
    statistics: Sequence[Callable[[Tensor], Tensor]],
    values: Sequence[float],
    sizes: Sequence[int],
    *,
    same_victims: bool,
) -> tuple[Tensor, float]:
    """Return resamples (R,) of the mean of `values`, and its variance.

    Each of the `statistics` gives a seed's value for drawn victims (R, N). Victims are drawn within each seed, together
    where they are the same. Seeds are drawn of what they differ by beyond that, widened as Student's distribution is for so
    few.
    """
    generator, seeds = torch.Generator().manual_seed(0), len(values)
    drawn = [torch.randint(sizes[0], (RESAMPLES, sizes[0]), generator=generator)]
    for size in sizes[1:]:
        again = torch.randint(size, (RESAMPLES, size), generator=generator)
        drawn.append(drawn[0] if same_victims else again)
    found = torch.tensor(values, dtype=torch.float64)  # (S,)
    widened = torch.tensor([math.sqrt(n / (n - 1)) if n > 1 else 1.0 for n in sizes])
    pairs = zip(statistics, drawn, strict=True)
    moved = torch.stack([statistic(rows) for statistic, rows in pairs], 1) - found  # (R, S)
    moved *= widened  # a resample of N spreads as N - 1
    common = moved.mean(1)  # (R,)
    if seeds == 1:
        return found + common, float(common.var())
    own = float((moved - common[:, None]).var(0).mean()) * seeds / (seeds - 1)
    spread = float(found.var())
    beyond = max(spread - own, 0.0)  # by which seeds differ more than their victims make them
    scale = math.sqrt(beyond / spread * seeds / (seeds - 1)) if spread else 0.0
    picked = torch.randint(seeds, (RESAMPLES, seeds), generator=generator)
    between = (found - found.mean())[picked].mean(1) * scale * student(seeds - 1) / NORMAL
    return found.mean() + common + between, float(common.var()) + beyond / seeds


def student(freedom: int) -> float:
    """Return within how many standard errors 95 % lie, with so many degrees of freedom.

    From tables up to ten, then by the expansion of Cornish and Fisher (Abramowitz and Stegun, 26.7.5).
    """
    if freedom <= len(STUDENT):
        return STUDENT[freedom - 1]
    z = NORMAL
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))


def rule_of_all(count: int) -> float:
    """Return the lower end of the exact 95 % interval of a share of which all of `count` draws were."""
    tail: float = ((1 - LEVEL) / 2) ** (1 / count)
    return tail


def _changes(before: Hits, after: Hits, drawn: Tensor) -> Tensor:
    return resampled_rates(after, drawn) - resampled_rates(before, drawn)


def _within(draws: Tensor, least: float) -> tuple[float, float]:
    low, high = middle(draws)
    return max(low, least), min(high, 1.0)


def _alike(pairs: Sequence[tuple[Hits, Hits]]) -> float | None:
    """The change of every victim, if it is the same nothing or the same everything."""
    each = {
        (right - was) / of if of else 0.0
        for before, after in pairs
        for (was, of), (right, _) in zip(before, after, strict=True)
    }
    return each.pop() if len(each) == 1 and each <= {0.0, 1.0, -1.0} else None


def _sizes(cells: Sequence[Hits], *, same_victims: bool) -> list[int]:
    sizes = [len(hits) for hits in cells]
    if not sizes or not all(sizes):
        raise AttackError("An interval over seeds needs a seed, and victims with each.")
    if same_victims and len(set(sizes)) > 1:
        raise AttackError(
            f"The same victims were said to be attacked with every seed, and there are {sizes} of them. Give "
            "same_victims=False, or the same number with each."
        )
    return sizes


def _facts(cells: Sequence[Hits]) -> dict[str, int]:
    tokens = sum(_tokens(hits) for hits in cells)
    return {"seeds": len(cells), "victims": sum(map(len, cells)), "tokens": tokens}


def _tokens(hits: Hits) -> int:
    return sum(of for _, of in hits)


def _note(sizes: Sequence[int]) -> str:
    if len(sizes) == 1:
        return "one seed says nothing of others"
    if len(sizes) < FEW:
        return f"{len(sizes)} seeds tell little of how seeds differ: the interval is too narrow"
    if min(sizes) == 1:
        return "one victim with a seed: what seeds differ by holds what victims do"
    return ""


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
