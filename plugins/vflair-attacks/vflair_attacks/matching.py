"""How well a hidden state explains an observation, under what is known or guessed of the defense."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from attrs import frozen
from torch import Tensor

Matching = Literal["likelihood", "sorted", "support"]
MATCHINGS = ("likelihood", "sorted", "support")


@frozen
class Measure:
    """A score (R × observations, candidates) → higher is better, and the noise it is a log-likelihood of.

    `noise` is known for one in nats as it is; gaussian for minus a sum of squares and laplace for minus a sum of
    magnitudes, whose scale must still be estimated. `in_any_order` if it is the same whatever the order of the coordinates of
    what is `expected` of a hidden state.
    """

    score: Callable[[Tensor, Tensor], Tensor]
    noise: Literal["known", "gaussian", "laplace"]
    in_any_order: bool = False
    expected: Callable[[Tensor], Tensor] = lambda hidden: hidden

    def in_nats(self, scores: Tensor, size: int, smallest: Tensor) -> Tensor:
        """Turn scores (N, W, V) of `size` numbers into log-likelihoods, for each example by what its best one leaves.

        `smallest` (N,) is the least variance to believe in.
        """
        if self.noise == "known":
            return scores
        best = -scores.flatten(1).max(1).values / size  # (N,)
        if self.noise == "laplace":
            return scores / best.maximum(smallest.sqrt())[:, None, None]
        return scores / (2 * best.maximum(smallest)[:, None, None])

    def off(self, scores: Tensor, seen: Tensor) -> Tensor:
        """Turn scores (..., C) of all releases (R, ..., D) into distances in units of what was seen; of known noise, into
        the nats that a release costs.
        """
        if self.noise == "known":
            return -scores / len(seen)
        if self.noise == "laplace":
            return -scores / seen.abs().sum((0, -1))
        return (-scores / seen.square().sum((0, -1))).clamp_min(0).sqrt()


def measure_of(matching: Matching, known: Any) -> Measure:
    """Return how candidates are compared with observations; `known` is the mechanism, or None.

    likelihood takes that of the known noise; sorted compares the values of a row whatever their order, for hidden
    dimensions that were permuted (Thomas et al., arXiv 2505.18332, sorted L1); support compares the coordinates that
    are not zero, for rows that were sparsified. The deterministic part of a known mechanism is applied first.
    """
    expected = (lambda hidden: hidden) if known is None else known.expected
    if matching == "sorted":
        return Measure(
            lambda seen, hidden: _sorted_l1(seen, expected(hidden)), "laplace",
            in_any_order=True, expected=expected,
        )  # fmt: skip
    if matching == "support":
        return Measure(lambda seen, hidden: _on_support(seen, expected(hidden)), "gaussian")
    if known is None:
        return Measure(_squared, "gaussian")
    return Measure(known.log_likelihood, "known" if known.in_nats else "gaussian")


def order_told_by(observed: Tensor, hidden: Tensor) -> Tensor:  # (..., D), (..., D) -> (..., D)
    """Return which coordinate of `observed` each one of `hidden` became: the one of the same rank.

    One row that was found tells the order of all rows: `observed.gather(-1, order)` is `hidden` again.
    """
    return observed.argsort(-1).gather(-1, hidden.argsort(-1).argsort(-1))


NEAREST_L1 = Measure(lambda seen, hidden: -(seen - hidden).abs().sum(-1), "laplace")


def _squared(observed: Tensor, hidden: Tensor) -> Tensor:
    return -(observed - hidden).square().sum(-1)


def _sorted_l1(observed: Tensor, hidden: Tensor) -> Tensor:
    return -(observed.sort(-1).values - hidden.sort(-1).values).abs().sum(-1)


def _on_support(observed: Tensor, hidden: Tensor) -> Tensor:
    return -((observed - hidden) * (observed != 0)).square().sum(-1)
