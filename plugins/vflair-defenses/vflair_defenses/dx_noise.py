"""d_χ noise on token embeddings: indistinguishable from near tokens, distinguishable from far ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from attrs import define, field, validators
from torch import Tensor

from vflair_core import Defense, DefenseError, Exchange, Guarantee, Mechanism
from vflair_defenses.d_chi import distance_noise, metric_guarantee, spread_of
from vflair_defenses.rows import drawing

if TYPE_CHECKING:
    from vflair_core import Party


@define(slots=False)
class DxNoise(Defense):
    """Add n = r·u, u uniform on the sphere and r ~ Gamma(D, 1/η), to each token embedding, fresh each time.

    Feyisetan et al., "Privacy- and Utility-Preserving Textual Analysis via Calibrated Multivariate Perturbations",
    WSDM 2020, arXiv 1910.08902. Differs from the paper: the noisy vector goes into the head as it is; it is not
    snapped to a token. What the head makes of it is post-processing. The promise is η·d per token and grows with
    the distance d of the tokens: read the ε at the median distance together with the length of the text.

    Attributes:
        eta: η per unit of distance; the noise is D/η long on average. inf adds none.
    """

    eta: float = field(default=100.0, validator=validators.gt(0))
    _median: float = field(init=False, default=0.0)
    _largest: float = field(init=False, default=0.0)

    covers = frozenset({"prompt", "response"})

    def prepare(self, public_texts: Sequence[str], data_party: Party) -> None:
        """Measure how far apart the token embeddings are."""
        table: Any = data_party.model.get_input_embeddings()
        with torch.no_grad():
            every = torch.arange(table.weight.shape[0], device=table.weight.device)
            self._median, self._largest = spread_of(table(every).cpu())

    def on_embeddings(self, embeddings: Tensor, exchange: Exchange) -> Tensor:  # (B, T, D)
        if math.isinf(self.eta):
            return embeddings
        return embeddings + distance_noise(embeddings, self.eta, exchange).to(embeddings.dtype)

    def mechanism(self) -> Mechanism:
        """What noise goes into the head. At the cut the head has bent it: a search estimates its scale there."""
        return DxEmbeddings(self.eta)

    def state(self) -> dict[str, Tensor]:
        return {"spread": torch.tensor([self._median, self._largest], dtype=torch.float64)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._median, self._largest = state["spread"].tolist()

    def guarantee(
        self, releases: int, messages: int = 0, gradients: int | None = None
    ) -> Guarantee:
        """One embedding of one token is one release and costs η times its distance to the other."""
        if not self._largest:
            raise DefenseError(
                "DxNoise does not know the distances of embeddings yet: call prepare(public_texts, data_party)."
            )
        outside = "changes of the embeddings by private training"
        return metric_guarantee(
            "token embeddings", self.eta, self._median, self._largest, releases, outside
        )


@define
class DxEmbeddings(Mechanism):
    """What an adaptive attacker knows of `DxNoise`: η, and so what she can train on."""

    eta: float

    def sample_embeddings(self, embeddings: Tensor, generator: torch.Generator) -> Tensor:
        if math.isinf(self.eta):
            return embeddings
        return embeddings + distance_noise(embeddings, self.eta, drawing(generator))
