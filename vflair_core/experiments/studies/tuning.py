"""Tune, then compare: each defense at the strongest setting that keeps a share of the undefended utility.

Every defense has the same number of trainings, and one option between a weak and a strong end; bisection looks for the
strongest value at which main performance is still `keep` of the undefended one, both counted above chance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import attrs
from attrs import field, frozen, validators

from vflair_core.errors import ExperimentError
from vflair_core.experiments.experiment import Experiment, Named

Scale = Literal["log", "linear", "log of the rest"]


@frozen
class Tune:
    """How defenses are tuned.

    Attributes:
        keep: Shares of the undefended main performance above chance that a setting must keep.
        trials: Trainings of each defense.
    """

    keep: tuple[float, ...] = field(default=(0.9,), converter=tuple)
    trials: int = field(default=6, validator=validators.ge(2))

    def __attrs_post_init__(self) -> None:
        if not self.keep or not all(0 < keep <= 1 for keep in self.keep):
            raise ExperimentError(
                f"tune.keep = {list(self.keep)}: give shares in (0, 1], e.g. 0.9."
            )
        if len(set(self.keep)) < len(self.keep):
            raise ExperimentError(f"tune.keep = {list(self.keep)}: give each share once.")


@frozen
class Knob:
    """The option by which a defense is tuned.

    Attributes:
        option: Its name.
        weak: Its value where the defense does least.
        strong: Its value where it does most.
        scale: Even steps of the logarithm, of the value, or of the logarithm of what is left to 1.
        whole: Whether values are whole numbers.
        defense: Which of the cell's defenses has it, counted from 0.
    """

    option: str
    weak: float
    strong: float
    scale: Scale = "log"
    whole: bool = False
    defense: int = field(default=0, validator=validators.ge(0))

    def __attrs_post_init__(self) -> None:
        ends = (
            (1 - self.weak, 1 - self.strong)
            if self.scale == "log of the rest"
            else (self.weak, self.strong)
        )
        if self.scale != "linear" and min(ends) <= 0:
            raise ExperimentError(
                f"knob {self.option}: {self.weak} to {self.strong} has no logarithm. Give ends above 0 (below 1 where "
                'scale = "log of the rest"), or scale = "linear".'
            )

    def value(self, strength: float) -> float:
        """The option at a strength in [0, 1], from weak to strong."""
        match self.scale:
            case "linear":
                value = (1 - strength) * self.weak + strength * self.strong
            case "log":
                value = _between(self.weak, self.strong, strength)
            case _:
                value = 1 - _between(1 - self.weak, 1 - self.strong, strength)
        return round(value) if self.whole else value

    def apply(self, e: Experiment, strength: float) -> Experiment:
        """The experiment with the option at this strength."""
        defenses = list(e.defenses)
        spec = defenses[self.defense]
        options = {**spec.options, self.option: self.value(strength)}
        defenses[self.defense] = Named(spec.name, options)
        return attrs.evolve(e, defenses=tuple(defenses))

    def check(self, e: Experiment, name: str) -> None:
        """See that the cell has the defense.

        Raises:
            ExperimentError: It has fewer.
        """
        if self.defense >= len(e.defenses):
            raise ExperimentError(
                f"{name} is tuned by {self.option!r} of its defense number {self.defense}, and has {len(e.defenses)} "
                "defenses. Counting begins with 0."
            )


def _between(weak: float, strong: float, strength: float) -> float:
    if strength in (0.0, 1.0):  # the very ends, whatever logarithms round to
        return (weak, strong)[int(strength)]
    return math.exp((1 - strength) * math.log(weak) + strength * math.log(strong))


@frozen
class Search:
    """Where the search for the strongest setting stands after some trials of (strength, main performance)."""

    target: float
    trials: int
    tried: Sequence[tuple[float, float]] = ()

    @property
    def best(self) -> float | None:
        """The strongest setting so far that reaches the target."""
        return max((s for s, reached in self.tried if reached >= self.target), default=None)

    @property
    def following(self) -> float | None:
        """The strength to try next; None when the search is over."""
        if len(self.tried) >= self.trials:
            return None
        if len(self.tried) < 2:  # both ends first
            return None if self.tried and self.best is None else float(len(self.tried))
        if self.best == 1.0:
            return None
        beyond = [s for s, reached in self.tried if reached < self.target and s > (self.best or 0)]
        return ((self.best or 0.0) + min(beyond)) / 2


def target_of(undefended: Mapping[str, Any], keep: float) -> float:
    """The main performance that keeps a share of the undefended one above chance."""
    chance, best = undefended["chance"], undefended["main_performance"]
    return float(chance + keep * (best - chance))
