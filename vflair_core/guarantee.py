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
    clip: float | None = None  # L2 norm of a row
    sensitivity: float | None = None  # L2
    noise: float | None = None  # standard deviation per coordinate
    delta: float | None = None
    epsilon_per_release: float | None = None
    releases: int = 0
    epsilon: float | None = None  # composed over all releases
    randomness: str = ""  # where the noise is drawn from
    excluded: str = "lengths, timing and floating-point sampling"

    def __str__(self) -> str:
        if self.mechanism is None:
            return "empirical, no guarantee"
        return (
            f"{self.mechanism}: epsilon {self.epsilon:.4g} at delta {self.delta:g} over "
            f"{self.releases} releases ({self.epsilon_per_release:.4g} each)"
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain values for a result file."""
        return {**attrs.asdict(self), "statement": str(self)}


EMPIRICAL = Guarantee()
