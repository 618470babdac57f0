"""The law of the crossing: what has not been through every defense that covers it does not leave.

One account is kept for each call of the model, and looked at where messages are made: whoever goes round a place where
a defense stands leaves no entry there, and nothing is sent.
"""

from __future__ import annotations

from attrs import define, field
from torch import Tensor

from vflair_core.tasks.collation import Owners

BEFORE = (
    "on_text",
    "on_tokens",
    "expand",
    "on_embeddings",
)  # of a call, before anything of it is sent


@define(eq=False)
class Account:
    """What the defenses did in one call of the model.

    `called` is what was called, for errors. `acted` has the places where every defense that stands there has acted, or
    said that it had nothing to do, by returning what it was given. `passed` holds what came out of ``on_smashed``.
    """

    called: str
    owners: Owners = ()  # of each row that crosses; of a row that is nobody's, a decoy, none
    acted: set[str] = field(factory=set)
    passed: list[Tensor] = field(factory=list)
    bypassed: bool = False  # no defense acts, for a positive control
    public: bool = (
        False  # what crosses is public text, and its gradient too, whichever thread sends that
    )
    gated: bool = False  # gradients may come of the loss that the model gives, and of nothing else
    loss_pass: int | None = None  # the backward pass that came of it last
