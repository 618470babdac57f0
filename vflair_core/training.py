"""Optimizer steps in two phases: both parties report, the data party decides, both commit.

Clipping, learning rate and skipping are decided from the gradient norms of all weights in the order of
the whole model, so that the split run takes the very steps the unsplit run takes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from attrs import field, frozen, validators
from torch import Tensor, nn

from vflair_core.data_party import DataParty
from vflair_core.defense import Batch
from vflair_core.optimizers import make_optimizer
from vflair_core.saving import load_run, save_run

Schedule = Literal["constant", "linear", "cosine"]


@frozen
class Train:
    """How to fine-tune.

    Attributes:
        steps: Optimizer steps.
        batch_size: Examples per step.
        learning_rate: Peak learning rate.
        optimizer: One of sgd, adam, adamw, at both parties.
        weight_decay: Of the optimizer.
        schedule: constant, linear (to 0) or cosine (to 0), after the warm-up.
        warmup: Steps of linear warm-up.
        clip: Largest norm of the gradient of all weights of both parties; 0 for none.
        max_length: Tokens kept of each example.
        evaluate_every: Steps between evaluations; 0 evaluates before and after only.
    """

    steps: int = field(default=100, validator=validators.ge(0))
    batch_size: int = field(default=8, validator=validators.ge(1))
    learning_rate: float = field(default=1e-3, validator=validators.gt(0))
    optimizer: Literal["sgd", "adam", "adamw"] = "adamw"
    weight_decay: float = field(default=0.0, validator=validators.ge(0))
    schedule: Schedule = "constant"
    warmup: int = field(default=0, validator=validators.ge(0))
    clip: float = field(default=1.0, validator=validators.ge(0))
    max_length: int = field(default=64, validator=validators.ge(2))
    evaluate_every: int = field(default=0, validator=validators.ge(0))

    def rate(self, step: int) -> float:
        """Learning rate of step number `step`, which counts from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(self.steps - self.warmup, 1)
        match self.schedule:
            case "linear":
                return self.learning_rate * (1 - done)
            case "cosine":
                return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
            case _:
                return self.learning_rate

    def optimizer_spec(self) -> dict[str, Any]:
        """What the model party is asked to build."""
        return {"name": self.optimizer, "lr": self.learning_rate, "weight_decay": self.weight_decay}


class FineTuning:
    """Fine-tunes across the cut. Both optimizers start fresh: one here, one at the model party."""

    def __init__(self, party: DataParty, options: Train) -> None:
        self.party, self.options = party, options
        own = [p for p in party.parameters() if p.requires_grad]
        own += [p for defense in party.defenses.each for p in defense.parameters()]
        self.optimizer = make_optimizer(own, options.optimizer_spec())
        party.line.open(party.defenses.each, options.optimizer_spec())

    def step(self, *batches: Batch) -> float:
        """Take one optimizer step over `batches` (gradient accumulation) and return the mean loss in nats."""
        self.party.model.train()
        losses = []
        for batch in batches:
            loss = self.party.model(**batch, use_cache=False).loss / len(batches)
            loss.backward()
            losses.append(loss.detach())
        rate = self.options.rate(self.party.step)
        self.commit(rate)
        for defense in self.party.defenses.each:
            defense.after_step()
        return float(torch.stack(losses).sum())

    def save(self, folder: str | Path) -> Path:
        """Let both parties write all that the run needs to go on from this step, each in its own folder.

        The model party writes to `model_party.checkpoints`, which its operator sets.

        Raises:
            CheckpointError: The folder holds another run.
            ProtocolError: The model party keeps no checkpoints.
        """
        return save_run(self, Path(folder))

    def load(self, folder: str | Path) -> int:
        """Go on from the last step that both parties saved; return how many steps are done.

        Raises:
            CheckpointError: There is no checkpoint, or it is of another model, cut or optimizer.
            ProtocolError: No step has the parts of both parties.
        """
        return load_run(self, Path(folder))

    def commit(self, rate: float) -> None:
        """Decide scale and skip from all gradient norms, then let both parties step, or neither.

        The model party goes first: if it refuses, nothing has changed on this side.

        Raises:
            ProtocolError: The model party refuses the step.
        """
        norms = self._norms()
        total = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
        skip, scale = not bool(total.isfinite()), None
        if self.options.clip:
            scale = float((self.options.clip / (total + 1e-6)).clamp(max=1.0))
        self.party.line.commit(scale=scale, rate=rate, skip=skip)
        if self.optimizer is None:
            return
        for group in self.optimizer.param_groups:
            group["lr"] = rate
            for parameter in group["params"]:
                if scale is not None and parameter.grad is not None:
                    parameter.grad.mul_(scale)
        if not skip:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _norms(self) -> list[Tensor]:
        reply = self.party.line.request("norms", None, (), {})
        theirs = dict(zip(reply.meta["names"], reply.tensors[0].tensor, strict=True))
        ours = {
            name: torch.linalg.vector_norm(p.grad)
            for name, p in self.party.named_parameters()
            if p.grad is not None
        }
        both = theirs | ours
        order = {name: n for n, name in enumerate(self.party.order)}
        return [both[name] for name in sorted(both, key=lambda name: order.get(name, len(order)))]


def train_unsplit(model: nn.Module, batches: Iterable[Batch], options: Train) -> list[float]:
    """Fine-tune the whole model by the textbook loop: the witness for what the split run must do."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(parameters, options.optimizer_spec())
    model.train()
    losses = []
    for step, batch in enumerate(batches):
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        if options.clip:
            nn.utils.clip_grad_norm_(parameters, options.clip)
        for group in _groups(optimizer):
            group["lr"] = options.rate(step)
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    return losses


def _groups(optimizer: torch.optim.Optimizer | None) -> list[dict[str, Any]]:
    return optimizer.param_groups if optimizer is not None else []
