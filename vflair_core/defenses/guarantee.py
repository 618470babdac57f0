"""What a defense promises, stated so that it can be checked."""

from __future__ import annotations

from typing import Any

import attrs
from attrs import frozen


@frozen
class Guarantee:
    """A differential-privacy statement about one run, or the plain word that there is none.

    One row of smashed data is one release; a run of n releases composes (no amplification by
    subsampling: the model party sees every message). Lengths, timing and floating-point sampling are
    outside the claim.
    """

    mechanism: str | None = None
    adjacency: str = ""  # what may change between neighbouring inputs
    clip: float | None = None  # largest norm, in the mechanism's own norm
    sensitivity: float | None = None  # in the same norm
    noise: float | None = None  # standard deviation per coordinate
    delta: float | None = None
    epsilon_per_release: float | None = None
    releases: int = 0
    epsilon: float | None = None  # composed over all releases
    typical: float | None = (
        None  # metric DP: the same for units at the median distance, not the largest
    )
    randomness: str = ""  # where the noise is drawn from
    excluded: str = "lengths, timing and floating-point sampling"

    def __str__(self) -> str:
        if self.mechanism is None:
            return "empirical, no guarantee"
        if self.typical is not None:
            return (
                f"{self.mechanism}: epsilon {self.typical:.4g} for units at the median distance, "
                f"{self.epsilon:.4g} at the largest, over {self.releases} releases"
            )
        return (
            f"{self.mechanism}: epsilon {self.epsilon:.4g} at delta {self.delta:g} over "
            f"{self.releases} releases ({self.epsilon_per_release:.4g} each)"
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain values for a result file."""
        return {**attrs.asdict(self), "statement": str(self)}


EMPIRICAL = Guarantee()
