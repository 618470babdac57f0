"""An optimizer step that both parties take or neither: both report, the data party decides, both commit.

The data party sees the norm of every weight's gradient, its own and the model party's, in the order of the
whole model, and decides scale, rate and skip from them as the unsplit loop would.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen
from torch import Tensor, nn

from vflair_core.errors import ProtocolError
from vflair_core.events import events

if TYPE_CHECKING:
    from vflair_core.parties.data_party.party import DataParty


@frozen
class Decision:
    """What was decided for one step: it is skipped, or all gradients are scaled and the step is taken."""

    skip: bool
    norm: float  # of all gradients of both parties, before clipping


def agree(
    party: DataParty,
    weights: Iterable[nn.Parameter],
    *,
    clip: float,
    rate: float,
    groups: Sequence[Mapping[str, Any]] | None = None,
) -> Decision:
    """Decide one step, let the model party take or skip it, and scale the gradients of `weights` for ours.

    The model party goes first: if it refuses, nothing has changed on this side.

    Args:
        party: The data party, after its backwards.
        weights: What the data party's optimizer trains; some may lie outside the model, as a prompt or a head of its own.
        clip: Largest norm of the gradient of all weights of both parties; 0 for none.
        rate: Learning rate of the model party's step.
        groups: Options of each group of the model party's optimizer instead (`Connection.commit`).

    Raises:
        ProtocolError: The model party refuses the step, or this is one of several processes.
    """
    refuse_several_processes()
    weights = list(weights)
    unscale = 1.0 / party.loss_scale
    norms = [norm * unscale for norm in joint_norms(party, weights)]
    total = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
    skip = party.overflowed or not bool(total.isfinite())
    if skip and unscale == 1.0:  # with a scaler, some steps are skipped as a rule
        events(__name__).warning("step_skipped", step=party.step, norm=float(total))
    factor = float((clip / (total + 1e-6)).clamp(max=1.0)) if clip else None
    scales = [s for s in (None if unscale == 1.0 else unscale, factor) if s is not None]
    together = None
    for scale in scales:
        together = scale if together is None else together * scale
    party.connection.commit(scale=None if skip else together, rate=rate, skip=skip, groups=groups)
    party.begin_step()
    for weight in weights:
        if weight.grad is not None:
            for scale in scales:
                weight.grad.mul_(scale)
    return Decision(skip, float(total))


def joint_norms(party: DataParty, weights: Sequence[nn.Parameter]) -> list[Tensor]:
    """Norms of the gradients of the data party's `weights` and of the model party's, in the order of the whole model.

    Weights that the model does not have come last.
    """
    reply = party.connection.request("norms")
    both = dict(zip(reply.meta["names"], reply.tensors[0].tensor, strict=True))
    names = {id(weight): name for name, weight in party.named_parameters()}
    for number, weight in enumerate(weights):
        if weight.grad is not None:
            name = names.get(id(weight), f"/{number}")
            both[name] = torch.linalg.vector_norm(weight.grad).cpu()
    place = _places(party.order)
    return [both[name] for name in sorted(both, key=lambda name: _place(name, place))]


def refuse_several_processes() -> None:
    """See that this process trains alone.

    Raises:
        ProtocolError: It is one of a group of processes, as `torchrun` starts them.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    count = torch.distributed.get_world_size()
    if count > 1:
        raise ProtocolError(
            f"This is one of {count} processes that train together. Each would train a model party of its own, and "
            "these would drift apart: only the data party's gradients are averaged. Train in one process, with "
            "gradient accumulation for larger batches; or let each process be a data party of its own, outside a "
            "process group, and share one model party (model_party.sharing = 'mean')."
        )


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
