"""A run that one process of the data party leaves and another takes up, while the model party keeps its session.

Unlike a checkpoint it asks nothing of the model party, whose weights and optimizer stay where they are: several data
parties that train the same weights may each do it at their own time.
"""

from __future__ import annotations

from pathlib import Path

from torch.optim import Optimizer

from vflair_core.errors import CheckpointError, ProtocolError, SessionLostError, VflairError
from vflair_core.parties.data_party.party import DataParty
from vflair_core.partition.checkpoint import DATA_FILE, optimizer_state, restore_optimizer
from vflair_core.partition.part_checks import check_counts
from vflair_core.training.checkpoint import TakenUp, run_state


def leave_run(party: DataParty, optimizer: Optimizer | None, folder: Path) -> Path:
    """Write all that the data party needs to go on, and the number of the last message that was answered."""
    party.connection.request("release")  # what the model party need not keep any more is told now
    return party.save_part(
        folder,
        {**optimizer_state(optimizer), **run_state(party)},
        optimizer=type(optimizer).__name__,
        exchanges=party.exchanges,
        answered=party.connection.seq,
    )


def take_up_run(party: DataParty, optimizer: Optimizer | None, folder: Path) -> int:
    """Put the data party where it was left, in its old session, and end the one that was opened afresh; return the step."""
    path = folder / DATA_FILE
    if not path.exists():
        raise CheckpointError(
            f"No run was left in {folder}: FineTuning.leave(folder) does it, in the process before this one."
        )
    taken = TakenUp.of(party, optimizer, path)
    check_counts(taken.facts, path, "answered")
    connection = party.connection
    fresh, seq, step = connection.session, connection.seq, connection.step
    connection.move(taken.facts["session"], taken.facts["answered"], taken.facts["step"])
    try:
        connection.request("facts")
    except VflairError as error:
        connection.move(fresh, seq, step)
        if not isinstance(error, ProtocolError):
            raise
        raise SessionLostError(
            f"The run in {path} cannot be taken up: the model party does not have its session at that point any more. It was "
            "taken up and gone on with elsewhere, dropped, or the model party was started anew. Go on from a checkpoint of "
            "both parties, or start anew."
        ) from error
    connection.close_other(fresh, seq)
    taken.restore(party)
    restore_optimizer(optimizer, taken.tensors)
    return party.step
