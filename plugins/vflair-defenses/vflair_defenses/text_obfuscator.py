"""Draw the rows of related tokens together and add noise: which token of its cluster it is shall be lost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import torch
from attrs import define, field, validators
from torch import Tensor

from vflair_core import Defense, DefenseError, Exchange, Mechanism
from vflair_defenses.rows import drawing, laplace_like, public_ids, real_rows, without_dropout

if TYPE_CHECKING:
    from vflair_core import Party


@define(slots=False)
class TextObfuscator(Defense):
    """Send h + Laplace(1/ε); train the head to bring h near its token's cluster and clusters away from each other.

    Zhou et al., "TextObfuscator: Making Pre-trained Language Model a Privacy Protector via Obfuscating Word
    Representations", Findings of ACL 2023. Loss: + close · mean‖h − c‖² − away · mean distance of the means of two
    clusters in the batch. Clusters are k-means over the mean row of each token in public text; a token that is not
    there counts by its row when it stands alone. Differs from VFLAIR-LLM: tokens find their clusters (there all
    fall into the first), the away term has a gradient, and any width will do. h has no bound, so the noise gives no
    guarantee.

    Attributes:
        epsilon: 1 / scale of the Laplace noise, in training and afterwards; inf adds none.
        clusters: k.
        close: Weight of the distance to the own cluster.
        away: Weight of the distance between clusters.
        seed: Seed of k-means.
    """

    epsilon: float = field(default=10.0, validator=validators.gt(0))
    clusters: int = field(default=100, validator=validators.ge(1))
    close: float = field(default=0.1, validator=validators.ge(0))
    away: float = field(default=0.5, validator=validators.ge(0))
    seed: int = 0
    _centres: Tensor = field(init=False, factory=lambda: torch.empty(0, 0), eq=False)
    _cluster_of: Tensor = field(init=False, factory=lambda: torch.empty(0).long(), eq=False)

    covers = frozenset({"prompt", "response"})
    supports = frozenset(
        {
            ("*", kind, "*")
            for kind in ("causal-lm", "classification", "regression", "question-answering")
        }
    )

    def prepare(self, public_texts: Sequence[str], data_party: Party) -> None:
        """Find the clusters, and the cluster of every token."""

        def make() -> dict[str, Tensor]:
            rows = _token_rows(public_texts, data_party)  # (V, D)
            centres, cluster_of = k_means(
                rows, self.clusters, self.seed, tell=partial(data_party.tell, self)
            )
            return {"centres": centres, "cluster_of": cluster_of}

        made = data_party.remember(self, public_texts, make)
        self._centres, self._cluster_of = made["centres"], made["cluster_of"]

    def on_smashed(self, smashed: Tensor, exchange: Exchange) -> Tensor:  # (B, T, D)
        if exchange.phase == "train" and (self.close or self.away):
            if not smashed.requires_grad:
                raise DefenseError(
                    "TextObfuscator trains the head, and nothing in it is trainable. Train it (train.trainable, "
                    "LoRA), or set close and away to 0."
                )
            exchange.memo["obfuscated"] = real_rows(smashed, exchange)
        if math.isinf(self.epsilon):
            return smashed
        return smashed + (laplace_like(smashed, exchange) / self.epsilon).to(smashed.dtype)

    def penalty(self, exchange: Exchange) -> Tensor | None:
        if not (self.close or self.away):
            return None
        if not len(self._centres):
            raise DefenseError(
                "TextObfuscator has no clusters yet: call prepare(public_texts, data_party) first."
            )
        rows = exchange.memo["obfuscated"].float()  # (N, D)
        ids = real_rows(exchange.batch["input_ids"][..., None], exchange).flatten().cpu()
        own = self._cluster_of[ids].to(rows.device)
        near = (rows - self._centres.to(rows.device)[own]).square().sum(-1).mean()
        present = own.unique()
        means = torch.stack([rows[own == cluster].mean(0) for cluster in present])
        apart = torch.pdist(means).mean() if len(means) > 1 else rows.new_zeros(())
        return self.close * near - self.away * apart

    def mechanism(self) -> Mechanism:
        return UnclippedLaplace(self.epsilon)

    def state(self) -> dict[str, Tensor]:
        return {"centres": self._centres, "cluster_of": self._cluster_of}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._centres, self._cluster_of = state["centres"], state["cluster_of"]


@attrs.frozen
class UnclippedLaplace(Mechanism):
    """The noise is known; what it is added to is the head's own output."""

    epsilon: float
    in_nats = True

    def sample(self, hidden: Tensor, generator: torch.Generator) -> Tensor:
        return hidden + laplace_like(hidden, drawing(generator)) / self.epsilon

    def log_likelihood(self, observed: Tensor, hidden: Tensor) -> Tensor:
        return -min(self.epsilon, 1e6) * (observed - hidden).abs().sum(-1)


def k_means(
    rows: Tensor,
    clusters: int,
    seed: int,
    *,
    rounds: int = 25,
    tell: Callable[[int, int], None] = lambda *_: None,
) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm from far rows (k-means++). Returns centres (K, D) and the cluster of each row (N,)."""
    generator = torch.Generator().manual_seed(seed)
    chosen = [int(torch.randint(len(rows), (), generator=generator))]
    squares = torch.full((len(rows),), math.inf)
    for _ in range(min(clusters, len(rows)) - 1):
        squares = torch.minimum(squares, (rows - rows[chosen[-1]]).square().sum(1))
        chosen.append(int(torch.multinomial(squares + 1e-30, 1, generator=generator)))
    centres = rows[chosen].clone()
    for number in range(rounds):
        tell(number, rounds)
        nearest = torch.cdist(rows, centres).argmin(1)
        counts = nearest.bincount(minlength=len(centres))
        sums = torch.zeros_like(centres).index_add(0, nearest, rows)
        # A cluster that lost all its rows stays where it is.
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], centres)
    return centres, torch.cdist(rows, centres).argmin(1)


def _token_rows(texts: Sequence[str], party: Party) -> Tensor:
    """The mean row of each token in public text, else its row alone: (V, D), on the CPU."""
    table: Any = party.model.get_input_embeddings()
    size = table.weight.shape[0]
    with torch.no_grad(), without_dropout(party):
        alone = [
            party.smashed(input_ids=some[:, None], use_cache=False)[:, 0].float().cpu()
            for some in torch.arange(size).split(1024)
        ]
        rows = torch.cat(alone)
        sums, counts = torch.zeros_like(rows), torch.zeros(size)
        for ids in public_ids("TextObfuscator", texts, party):
            found = party.smashed(input_ids=ids, use_cache=False)[0].float().cpu()
            sums.index_add_(0, ids[0], found)
            counts.index_add_(0, ids[0], torch.ones(ids.shape[1]))
    return torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], rows)
