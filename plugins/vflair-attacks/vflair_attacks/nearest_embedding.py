"""The weakest attacker with weights: compare each hidden state with the public embedding table."""

from __future__ import annotations

from attrs import field, frozen, validators
from torch import Tensor, cat
from torch.nn.functional import normalize

from vflair_core import Guess


@frozen
class NearestEmbedding:
    """Guess at each position the token whose embedding is nearest by cosine.

    Song & Raghunathan, "Information Leakage in Embedding Models", CCS 2020, arXiv 2004.00053, reduced to
    its simplest form: no model is inverted. Positions and blocks between the table and the cut are ignored.

    Attributes:
        chunk: Rows compared in one pass.
    """

    chunk: int = field(default=4096, validator=validators.ge(1))

    def __call__(
        self, smashed: Tensor, mask: Tensor, embeddings: Tensor
    ) -> Guess:  # (N, T, D), (N, T), (V, D)
        table = normalize(embeddings, dim=-1)
        tokens = mask.long() - 1  # -1 where there is nothing to guess
        real = smashed[mask]  # (rows, D)
        found = [(normalize(rows, dim=-1) @ table.T).argmax(-1) for rows in real.split(self.chunk)]
        tokens[mask] = cat(found)
        return Guess(tokens=tokens, budget={"forwards": 0})
