"""A secret order of the coordinates: a control that is known to be broken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import attrs
import torch
from attrs import define, field
from torch import Tensor, nn

from vflair_core import Defense, DefenseError, Exchange, Mechanism
from vflair_defenses.rows import width_of

if TYPE_CHECKING:
    from vflair_core import Party


@define(slots=False)
class Permutation(Defense):
    """Send H·P for one permutation P of the D coordinates; the model party puts them back behind the channel.

    The idea of Yuan et al., "Secure Transformer Inference" (STIP), arXiv 2312.00025, where a third party folds P
    into the weights. A control: the sorted values of a row do not change, and vocabulary matching on them
    recovers all tokens (Thomas et al., "Hidden No More", ICML 2025, arXiv 2505.18332). Here the model party holds
    P itself, as the counterpart; who only reads the wire does not.

    Attributes:
        seed: Seed of the permutation. An adaptive attacker knows the options, and so this.
    """

    seed: int = 0
    _order: Tensor = field(init=False, factory=lambda: torch.empty(0, dtype=torch.int64), eq=False)

    covers = frozenset({"prompt", "response"})
    axes = frozenset({"BTD", "TBD", "BD"})

    def prepare(self, public_texts: Sequence[str], data_party: Party) -> None:
        """Draw the permutation for the width of the model's hidden states, and send it to the model party."""
        generator = torch.Generator().manual_seed(self.seed)
        self._order = torch.randperm(width_of(data_party), generator=generator)
        data_party.open()

    def on_smashed(self, smashed: Tensor, exchange: Exchange) -> Tensor:  # (..., D)
        return smashed[..., self._ready().to(smashed.device)]

    def counterpart(self) -> nn.Module | None:
        order = self._order
        if not len(order):
            return None  # nothing can cross before `prepare`
        inverse = nn.Linear(len(order), len(order), bias=False)
        inverse.weight = nn.Parameter(torch.eye(len(order))[:, order])  # x[order] W^T = x
        return inverse

    def mechanism(self) -> Mechanism:
        """The order if it is granted, else only that there is one: match sorted rows."""
        return KnownOrder(self._order) if len(self._order) else SecretOrder()

    def state(self) -> dict[str, Tensor]:
        return {"order": self._order}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._order = state["order"]

    def _ready(self) -> Tensor:
        if not len(self._order):
            raise DefenseError(
                "Permutation does not know the width yet: call prepare([], data_party) first, before "
                "anything crosses."
            )
        return self._order


@attrs.frozen(eq=False)
class KnownOrder(Mechanism):
    """The permutation itself."""

    order: Tensor

    def expected(self, hidden: Tensor) -> Tensor:
        return hidden[..., self.order.to(hidden.device)]


@attrs.frozen
class SecretOrder(Mechanism):
    """Sorted values are the same in every order."""

    def log_likelihood(self, observed: Tensor, hidden: Tensor) -> Tensor:
        gap = observed.sort(-1).values - hidden.sort(-1).values
        return -gap.abs().sum(-1)
