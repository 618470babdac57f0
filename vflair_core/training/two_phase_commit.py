"""An optimizer step that both parties take or neither: both report, the data party decides, both commit.

The data party sees the norm of every weight's gradient, its own and the model party's, in the order of the
whole model, and decides scale, rate and skip from them as the unsplit loop would.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from attrs import frozen
from torch import Tensor, nn

if TYPE_CHECKING:
    from vflair_core.parties.data_party.party import DataParty


@frozen
class Decision:
    """What was decided for one step: it is skipped, or all gradients are scaled and the step is taken."""

    skip: bool
    norm: float  # of all gradients of both parties, before clipping


def agree(
    party: DataParty, weights: Iterable[nn.Parameter], *, clip: float, rate: float
) -> Decision:
    """Decide one step, let the model party take or skip it, and scale the gradients of `weights` for ours.

    The model party goes first: if it refuses, nothing has changed on this side.

    Args:
        party: The data party, after its backwards.
        weights: What the data party's optimizer trains.
        clip: Largest norm of the gradient of all weights of both parties; 0 for none.
        rate: Learning rate of the model party's step.

    Raises:
        ProtocolError: The model party refuses the step.
    """
    unscale = 1.0 / party.loss_scale
    norms = [norm * unscale for norm in joint_norms(party)]
    total = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
    skip = party.overflowed or not bool(total.isfinite())
    factor = float((clip / (total + 1e-6)).clamp(max=1.0)) if clip else None
    scales = [s for s in (None if unscale == 1.0 else unscale, factor) if s is not None]
    together = None
    for scale in scales:
        together = scale if together is None else together * scale
    party.connection.commit(scale=None if skip else together, rate=rate, skip=skip)
    party.begin_step()
    for weight in weights:
        if weight.grad is not None:
            for scale in scales:
                weight.grad.mul_(scale)
    return Decision(skip, float(total))


def joint_norms(party: DataParty) -> list[Tensor]:
    """Norms of the gradients of both parties' weights, in the order of the whole model."""
    reply = party.connection.request("norms")
    theirs = dict(zip(reply.meta["names"], reply.tensors[0].tensor, strict=True))
    ours = {
        name: torch.linalg.vector_norm(p.grad).cpu()
        for name, p in party.named_parameters()
        if p.grad is not None
    }
    both = theirs | ours
    place = _places(party.order)
    return [both[name] for name in sorted(both, key=lambda name: _place(name, place))]


def _places(order: Iterable[str]) -> dict[str, int]:
    """Where each weight of the whole model stands, and each module: where its first weight does."""
    places: dict[str, int] = {}
    for number, name in enumerate(order):
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            places.setdefault(".".join(parts[:end]), number)
    return places


def _place(name: str, places: dict[str, int]) -> int:
    """The place of a weight; one that an adapter brought stands where the module it adapts does."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if (found := places.get(".".join(parts[:end]))) is not None:
            return found
    return len(places)
