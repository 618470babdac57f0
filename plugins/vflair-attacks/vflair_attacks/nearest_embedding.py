"""The weakest attacker with weights: compare each hidden state with the public embedding table."""

from __future__ import annotations

import torch
from attrs import field, frozen, validators
from torch import Tensor
from torch.nn.functional import normalize

from vflair_core import Guess


@frozen
class NearestEmbedding:
    """Guess at each position the token whose embedding is nearest by cosine.

    Song & Raghunathan, "Information Leakage in Embedding Models", CCS 2020, arXiv 2004.00053, reduced to
    its simplest form: no model is inverted. Positions and blocks between the table and the cut are ignored, so on a real
    LLM it reads nothing: a few coordinates of the residual stream are huge there, and the cosine is theirs. Small random
    models have none, and half of their text is read. Use linear-inverter.

    Attributes:
        chunk: Rows compared in one pass.
    """

    chunk: int = field(default=4096, validator=validators.ge(1))

    def __call__(
        self,
        smashed: Tensor,  # (N, T, D)
        mask: Tensor,  # (N, T)
        embeddings: Tensor,  # (V, D)
        device: torch.device | str = "cpu",
    ) -> Guess:
        table = normalize(embeddings.to(device), dim=-1)
        tokens = mask.long() - 1  # -1 where there is nothing to guess
        real = smashed[mask].to(device)  # (rows, D)
        found = [(normalize(rows, dim=-1) @ table.T).argmax(-1) for rows in real.split(self.chunk)]
        tokens[mask] = torch.cat(found).cpu()
        return Guess(tokens=tokens, budget={"forwards": 0})
