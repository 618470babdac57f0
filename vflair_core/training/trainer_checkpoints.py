"""Checkpoints of transformers' `Trainer` that hold both parties' parts.

The Trainer's ``checkpoint-N`` gets the data party's part of the run beside what the Trainer writes itself; the model
party keeps its own where its operator said. Its part is written first, and the Trainer's last: a checkpoint that the
Trainer finds complete has all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch.optim import Optimizer

from vflair_core.errors import CheckpointError, ProtocolError
from vflair_core.partition.adapters import adapter_facts
from vflair_core.partition.checkpoint import DATA_FILE, read_facts
from vflair_core.training.checkpoint import TakenUp, resume_session, run_state

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from vflair_core.parties.data_party.party import DataParty

WEIGHTS = "model.safetensors"  # where the Trainer looks for weights


class TrainerCheckpoints:
    """One `train()` of the Trainer: what it saves, and what it is resumed from."""

    def __init__(
        self,
        party: DataParty,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
    ) -> None:
        self.party, self.args, self.progress, self.control = party, args, state, control
        self.folder = Path(args.output_dir or ".")
        self._optimizer: Optimizer | None = None
        self._spec: Mapping[str, Any] = {}

    def check(self, *, keeps: bool) -> None:
        """See before the first step that what the Trainer will want to save can be.

        Args:
            keeps: Whether the model party keeps checkpoints.

        Raises:
            ProtocolError: It cannot.
        """
        if self.args.save_strategy == "no":
            return
        if not keeps:
            raise ProtocolError(
                "The Trainer will save (save_strategy is not 'no'), and the model party keeps "
                "no checkpoints. Its operator allows it: model_party.checkpoints = folder. Or train without: "
                "save_strategy='no'."
            )
        adapter_facts(self.party.model)  # refuses what no part can hold
        if self.progress.is_hyper_param_search:
            raise ProtocolError(
                "Trials of a search for hyper-parameters cannot be saved. Use save_strategy='no'."
            )

    def begin(self, spec: Mapping[str, Any], optimizer: Optimizer) -> None:
        """Remember what the run is made with; from now on the model may save its half in the Trainer's checkpoints."""
        self._spec, self._optimizer = spec, optimizer
        self.party.model.save_pretrained = self._save_weights  # type: ignore[assignment]

    def end(self) -> None:
        """From now on the model refuses to be saved as a whole one again."""
        vars(self.party.model).pop("save_pretrained", None)

    def _save_weights(self, folder: Any, *_: Any, **__: Any) -> None:
        if not self.control.should_save:
            type(self.party.model).save_pretrained(
                self.party.model, folder
            )  # says what to do instead
        Path(folder).mkdir(parents=True, exist_ok=True)
        state = self.party.model.state_dict()
        copies = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
        save_file(copies, Path(folder) / WEIGHTS, metadata={"format": "pt"})

    def save(self) -> None:
        """Let the model party write its part of the step at hand, then write the data party's."""
        if self._optimizer is None or not self.control.should_save:
            return
        party, folder = self.party, self._folder(self.progress.global_step)
        kept = [facts["step"] for facts in self._earlier()]
        party.connection.request("save", meta={"keep": [*kept, party.step]})
        party.save_part(
            folder,
            run_state(party),
            optimizer=type(self._optimizer).__name__,
            exchanges=party.exchanges,
        )

    def resume(self, spec: Mapping[str, Any], optimizer: Optimizer) -> None:
        """Put both parties where they were when the checkpoint that the Trainer goes on from was written.

        Raises:
            CheckpointError: The checkpoint has no part of the data party, or one of another model, cut or optimizer.
            ProtocolError: The model party has no part of it.
        """
        folder = self._folder(self.progress.global_step)
        if optimizer.state:
            self._load(folder, spec, optimizer)
            return
        # With save_only_model the Trainer has kept no optimizer and no random state: both parties begin with fresh ones.
        with torch.random.fork_rng():
            self._load(folder, spec, optimizer)
        self.party.open(spec)

    def load_best(self, state: TrainerState) -> bool:
        """Put both parties where the Trainer's best checkpoint was written, if it loaded that; return whether it did."""
        if not self.args.load_best_model_at_end or state.best_model_checkpoint is None:
            return False
        assert self._optimizer is not None
        with torch.random.fork_rng():
            self._load(Path(state.best_model_checkpoint), self._spec, self._optimizer)
        return True

    def _load(self, folder: Path, spec: Mapping[str, Any], optimizer: Optimizer) -> None:
        path = folder / DATA_FILE
        if not path.exists():
            raise CheckpointError(
                f"There is no {DATA_FILE} in {folder}: it was not written with SplitCallback in this output_dir, or "
                "writing it was broken off. Go on from another checkpoint of this run."
            )
        taken_up = TakenUp.of(self.party, optimizer, path)
        facts = taken_up.facts
        resume_session(self.party, spec, facts["session"], [facts["step"]])
        taken_up.restore(self.party)

    def _folder(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step}"

    def _earlier(self) -> list[dict[str, Any]]:
        """The facts of the checkpoints of this session that still exist."""
        paths = self.folder.glob(f"checkpoint-*/{DATA_FILE}")
        each = [read_facts(path) for path in paths]
        return [facts for facts in each if facts["session"] == self.party.connection.session]
