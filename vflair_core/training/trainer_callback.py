"""Transformers' `Trainer` on the data party's model, with the model party taking every step too."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from vflair_core.communication.optimizers import OPTIMIZERS
from vflair_core.errors import ProtocolError
from vflair_core.training.two_phase_commit import Decision, agree

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from vflair_core.parties.data_party.party import DataParty


class SplitCallback(TrainerCallback):  # type: ignore[misc]
    """Makes ``Trainer(data_party.model, ..., callbacks=[SplitCallback(data_party)])`` train both parties.

    The model party builds the optimizer that the Trainer has, and takes each of its steps at the same learning
    rate. Clipping sees the gradients of both parties; `max_grad_norm` is 0 while it runs, because the Trainer
    itself would clip by the data party's half. A gradient that is not finite skips the step of both.
    """

    def __init__(self, party: DataParty) -> None:
        self.party = party
        self._clip: float | None = None
        self._decision: Decision | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        if args.fp16:
            raise ProtocolError(
                "The Trainer's fp16 scales the loss where vflair cannot see it. Use bf16=True, or FineTuning with "
                "scaler=torch.amp.GradScaler()."
            )
        self.party.open(_spec_of(parts["optimizer"]))
        if self._clip is None:  # else the last run broke off and left 0 behind
            self._clip = args.max_grad_norm or 0.0
        args.max_grad_norm = 0.0

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        groups = parts["optimizer"].param_groups
        weights = [weight for group in groups for weight in group["params"]]
        self._decision = agree(self.party, weights, clip=self._clip or 0.0, rate=groups[0]["lr"])
        if self._decision.skip:
            parts["optimizer"].zero_grad()  # without gradients the Trainer's step changes nothing

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
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

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        args.max_grad_norm, self._clip = self._clip or 0.0, None


def _spec_of(optimizer: Any) -> dict[str, Any]:
    """Describe the Trainer's optimizer so that the model party can build the same."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    names = {kind: name for name, kind in OPTIMIZERS.items()}
    if type(optimizer) not in names:
        raise ProtocolError(
            f"The model party cannot build a {type(optimizer).__name__}; it knows {', '.join(OPTIMIZERS)}. Use "
            "e.g. TrainingArguments(optim='adamw_torch')."
        )
    known = set(inspect.signature(type(optimizer)).parameters)
    first, *others = optimizer.param_groups
    rates = {float(group["lr"]) for group in optimizer.param_groups}
    if len(rates) > 1:
        raise ProtocolError(
            f"The parameter groups have learning rates {sorted(rates)}; the model party takes one."
        )
    options = {
        key: value
        for key, value in first.items()
        if key in known and key != "params" and not torch.is_tensor(value)
    }
    options["lr"] = rates.pop()
    options["weight_decay"] = max(group["weight_decay"] for group in (first, *others))
    return {"name": names[type(optimizer)], **options, "exempt": True}
