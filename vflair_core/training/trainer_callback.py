"""Transformers' `Trainer` on the data party's model, with the model party taking every step too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from vflair_core.communication.optimizers import options_of
from vflair_core.errors import ProtocolError
from vflair_core.training.mirrored_optimizer import GroupOf, mirrored
from vflair_core.training.trainer_checkpoints import TrainerCheckpoints
from vflair_core.training.two_phase_commit import Decision, agree, refuse_several_processes

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from vflair_core.parties.data_party.party import DataParty


class SplitCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Makes ``Trainer(data_party.model, ..., callbacks=[SplitCallback(data_party)])`` train both parties.

    The model party builds the optimizer that the Trainer has, and takes each of its steps with the options that it
    has then. Clipping sees the gradients of both parties; `max_grad_norm` is 0 while it runs, because the Trainer
    itself would clip by the data party's half. A gradient that is not finite skips the step of both. Whenever the
    Trainer saves, both parties do, and `resume_from_checkpoint` and `load_best_model_at_end` bring both back.

    Args:
        party: The data party.
        group_of: For an optimizer of your own with several groups of weights: from the name that a weight has in
            the whole model to the number of its group. Only needed where the groups of the data party's own weights
            do not say it for those of the model party.

    Raises:
        ProtocolError: When training begins: this optimizer cannot be built at the model party, or the Trainer would
            train in a way that the model party cannot follow.
    """

    def __init__(self, party: DataParty, *, group_of: GroupOf | None = None) -> None:
        self.party, self.group_of = party, group_of
        self._clip: float | None = None
        self._decision: Decision | None = None
        self._checkpoints: TrainerCheckpoints | None = None
        self._trained: tuple[Optimizer, int] | None = (
            None  # the optimizer, and the last step that both parties took
        )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        _check_arguments(args)
        optimizer = _unwrapped(parts["optimizer"])
        theirs = self.party.connection.facts()
        spec = mirrored(optimizer, self.party, theirs["trainable"], self.group_of)
        self._checkpoints = TrainerCheckpoints(self.party, args, state, control)
        self._checkpoints.check(keeps=theirs["keeps"])
        if state.global_step:
            self._checkpoints.resume(spec, optimizer)
        elif optimizer.state and self._trained != (optimizer, self.party.step):
            raise ProtocolError(
                "The Trainer's optimizer has been used before, and the model party's has not: it would begin without "
                "what this one remembers of earlier steps. Give the Trainer a fresh optimizer (trainer.optimizer = "
                "None), or go on from a checkpoint: trainer.train(resume_from_checkpoint=True)."
            )
        elif not optimizer.state:
            self.party.open(spec)
        self._checkpoints.begin(spec, optimizer)
        if self._clip is None:  # else the last run broke off and left 0 behind
            self._clip = args.max_grad_norm or 0.0
        args.max_grad_norm = 0.0

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        optimizer = _unwrapped(parts["optimizer"])
        weights = _weights_of(optimizer, parts["model"])
        told, clip = options_of(optimizer), self._clip or 0.0
        self._decision = agree(self.party, weights, clip=clip, rate=told[0]["lr"], groups=told)
        if self._decision.skip:
            optimizer.zero_grad()  # without gradients the Trainer's step changes nothing

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        self._trained = (_unwrapped(parts["optimizer"]), self.party.step)
        for defense in self.party.defenses.each:
            defense.after_step()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        if self._decision is None:
            return
        for logs in (parts["logs"], state.log_history[-1]):
            if "grad_norm" in logs:  # the Trainer knows the norm of its half
                logs["grad_norm"] = self._decision.norm

    def state(self) -> dict[str, Any]:
        """Let both parties save: the Trainer asks for this while it writes a checkpoint."""
        if self._checkpoints is not None:
            self._checkpoints.save()
        return {"args": {}, "attributes": {}}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        args.max_grad_norm, self._clip = self._clip or 0.0, None
        if self._checkpoints is not None:
            if self._checkpoints.load_best(state):
                self._trained = None
            self._checkpoints.end()
            self._checkpoints = None


def _check_arguments(args: TrainingArguments) -> None:
    """See that the model party can follow.

    Raises:
        ProtocolError: It cannot.
    """
    refuse_several_processes()
    if args.fp16:
        raise ProtocolError(
            "The Trainer's fp16 scales the loss where vflair cannot see it. Use bf16=True, or FineTuning with "
            "scaler=torch.amp.GradScaler()."
        )
    if args.n_gpu > 1:
        raise ProtocolError(
            f"The Trainer would put copies of the model on {args.n_gpu} devices (DataParallel), which the model party "
            "cannot follow. Show it one: CUDA_VISIBLE_DEVICES=0."
        )
    if args.restore_callback_states_from_checkpoint:
        raise ProtocolError(
            "restore_callback_states_from_checkpoint makes callbacks anew without their parties. SplitCallback needs "
            "no such restoring: leave it off."
        )


def _unwrapped(optimizer: Any) -> Any:
    return getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it


def _weights_of(optimizer: Optimizer, model: nn.Module) -> list[nn.Parameter]:
    """What the Trainer clips by, and what its optimizer steps: each once."""
    held = (weight for group in optimizer.param_groups for weight in group["params"])
    return list({id(weight): weight for weight in (*model.parameters(), *held)}.values())
