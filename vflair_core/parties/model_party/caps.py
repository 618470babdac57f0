"""How much a data party may ask of the model party; a request over a cap is refused, nothing is dropped."""

from __future__ import annotations

from attrs import define


@define(eq=False)
class Caps:
    """How much one session may hold at the model party."""

    graphs: int = 256  # forwards that wait for their backward
    caches: int = 64
    programs: int = 1024
