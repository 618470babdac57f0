"""A data party's adapters as arrays of Flower, for the strategies that average them."""

from __future__ import annotations

from collections import OrderedDict

import torch
from flwr.app import ArrayRecord

from vflair_core import DataParty, ProtocolError


def adapters_of(party: DataParty) -> ArrayRecord:
    """The weights that the data party trains, under the names they have in the whole model."""
    weights = [
        (n, w.detach().float().cpu()) for n, w in party.named_parameters() if w.requires_grad
    ]
    return ArrayRecord(OrderedDict(weights))


def put_into(party: DataParty, arrays: ArrayRecord) -> None:
    """Give the data party these adapters for its own.

    Raises:
        ProtocolError: They are others than it has; nothing is changed.
    """
    given = arrays.to_torch_state_dict()
    own = {name: weight for name, weight in party.named_parameters() if weight.requires_grad}
    alike = given.keys() == own.keys() and all(given[n].shape == w.shape for n, w in own.items())
    if not alike:
        raise ProtocolError(
            f"The averaged adapters do not fit: {len(given)} weights came, and this half trains {len(own)}. The strategy must "
            "return what the nodes sent, averaged."
        )
    with torch.no_grad():
        for name, weight in own.items():
            weight.copy_(given[name])
