"""Fine-tuning across the cut: the very steps that the textbook loop takes on the unsplit model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from attrs import field, frozen, validators
from torch import nn

from vflair_core.communication.optimizers import make_optimizer, options_of
from vflair_core.parties.data_party.party import DataParty
from vflair_core.partition.slices import check_names
from vflair_core.randomness import random_states, set_random_states
from vflair_core.tasks.collation import Batch, loss_items
from vflair_core.training.checkpoint import load_run, save_run
from vflair_core.training.lasting_run import Batches, run_lasting
from vflair_core.training.left_run import leave_run, take_up_run
from vflair_core.training.tuning import EVERYTHING, Lora
from vflair_core.training.two_phase_commit import agree, refuse_several_processes

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
        max_length: Tokens kept of each row: an example, or a window of a passage.
        packing: Put several texts into one row of max_length tokens; causal-lm only.
        evaluate_every: Steps between evaluations; 0 evaluates before and after only.
        trainable: Slices that are trained: data_party, model_party, head, body, tail, embeddings, task_head, blocks.0, blocks.1, …
        lora: Train low-rank adapters in these slices instead of the weights themselves.
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
    packing: bool = False
    evaluate_every: int = field(default=0, validator=validators.ge(0))
    trainable: tuple[str, ...] = field(
        default=EVERYTHING, converter=tuple, validator=lambda *three: check_names(three[2])
    )
    lora: Lora = Lora()

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
    """Fine-tunes across the cut. Both optimizers start fresh: one here, one at the model party.

    Freeze and adapt weights (`tune`) before: the optimizers take what is trainable now.

    Args:
        party: The data party.
        options: How.
        scaler: Scales the loss, for half precision. Defenses get gradients without that factor, and a
            gradient of either party that is not finite skips the step of both.
    """

    def __init__(
        self, party: DataParty, options: Train, *, scaler: torch.amp.GradScaler | None = None
    ) -> None:
        self.party, self.options = party, options
        trained = [p for p in party.parameters() if p.requires_grad]
        trained += [p for defense in party.defenses.each for p in defense.parameters()]
        self.optimizer = make_optimizer(trained, options.optimizer_spec())
        self._scaling = Scaling(scaler) if scaler is not None else None
        self._built_with = options_of(self.optimizer) if self.optimizer else []
        refuse_several_processes()
        party.open(options.optimizer_spec())

    def step(self, *batches: Batch, rate: float | None = None) -> float:
        """Take one optimizer step over `batches` (gradient accumulation) and return the mean loss in nats.

        The step is that of all as one batch: each counts by what its loss is the mean of, tokens or rows. One from which
        nothing is learnt does not cross. A step that fails leaves nothing behind, at neither party, and may be taken again.

        `rate` is the learning rate of both parties, e.g. of a torch scheduler; by default the schedule's.
        """
        self.party.model.train()
        losses: list[torch.Tensor] = []
        model: Any = self.party.model
        shifted = model.can_generate() and not model.config.is_encoder_decoder
        items = [loss_items(batch, shifted=shifted) for batch in batches]
        total = sum(items)
        if self._scaling is not None:
            self.party.loss_scale = self._scaling.scale
        begin = Beginning.of(self.party)
        try:
            for batch, count in zip(batches, items, strict=True):
                if not count and total:
                    continue
                loss = model(**batch, use_cache=False).loss / (total / count if count else 1)
                (loss * self.party.loss_scale if self._scaling else loss).backward()
                losses.append(loss.detach())
            self.commit(self.options.rate(self.party.step) if rate is None else rate)
        except BaseException:
            begin.restore(self.party)
            if self.optimizer is not None:
                self.optimizer.zero_grad(set_to_none=True)
            raise
        finally:
            self.party.loss_scale = 1.0
        for defense in self.party.defenses.each:
            defense.after_step()
        return float(torch.stack(losses).sum())

    def run(
        self, batches: Batches, folder: str | Path, *, every: int = 50, patience: float = 600.0
    ) -> dict[int, float]:
        """Take all steps, and go on by itself whenever the model party, the way there or this process breaks down.

        Both parties save their part every few steps. A model party that is started anew is waited for and taken back to the
        last step that both have; call it again with the same `folder` in a new process, and it goes on from there. Losses
        are those of a run that never broke off.

        Args:
            batches: What a step learns from, by its number: one batch, or several to accumulate.
            folder: Where the data party saves its part.
            every: Steps between two checkpoints; the last two are kept.
            patience: Seconds to wait for the model party.

        Returns:
            The mean loss of each step that was taken here, in nats, by the step's number.

        Raises:
            ChannelError: The model party was not reached for so long.
            CheckpointError: The folder holds another run, or cannot be written.
            ProtocolError: The model party keeps no checkpoints, or the run broke off several times at one step.
        """
        steps = self.options.steps
        return run_lasting(self, batches, Path(folder), steps=steps, every=every, patience=patience)

    def save(self, folder: str | Path, *, keep: int | None = None) -> Path:
        """Let both parties write all that the run needs to go on from this step, each in its own folder.

        The model party writes to `model_party.checkpoints`, which its operator sets. Of each party's parts the last `keep`
        stay, by default all.

        Raises:
            CheckpointError: The folder holds another run.
            ProtocolError: The model party keeps no checkpoints.
        """
        return save_run(self.party, self.optimizer, Path(folder), keep)

    def load(self, folder: str | Path) -> int:
        """Go on from the last step that both parties saved; return how many steps are done.

        Raises:
            CheckpointError: There is no checkpoint, or it is of another model, cut or optimizer.
            ProtocolError: No step has the parts of both parties.
        """
        return load_run(self.party, self.optimizer, self.options.optimizer_spec(), Path(folder))

    def leave(self, folder: str | Path) -> Path:
        """Write what another process needs to go on with this run, while the model party keeps its session open.

        Close the channel then, and not the data party. Nothing is asked of the model party, so data parties that share its
        weights can do this each at its own time; where the model party may be started anew meanwhile, `save` instead.

        Raises:
            CheckpointError: The folder cannot be written.
        """
        return leave_run(self.party, self.optimizer, Path(folder))

    def take_up(self, folder: str | Path) -> int:
        """Go on with the run that was left in `folder`, as the same client; return how many steps are done.

        Raises:
            CheckpointError: No run was left there, or one of another model, cut or optimizer.
            SessionLostError: The model party does not have its session at that point any more.
        """
        return take_up_run(self.party, self.optimizer, Path(folder))

    def commit(self, rate: float) -> None:
        """Decide scale and skip from all gradient norms, then let both parties step, or neither.

        The model party goes first: if it refuses, nothing has changed on this side.

        Raises:
            ProtocolError: The model party refuses the step.
        """
        groups = _groups(self.optimizer)
        weights = [parameter for group in groups for parameter in group["params"]]
        told = self._changed_options(rate)
        decision = agree(self.party, weights, clip=self.options.clip, rate=rate, groups=told)
        if self._scaling is not None:
            self._scaling.update(overflow=decision.skip)
        if self.optimizer is None:
            return
        for group in groups:
            group["lr"] = rate
        if not decision.skip:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _changed_options(self, rate: float) -> list[dict[str, Any]] | None:
        """What the model party must be told besides the rate: a scheduler of torch may change other options too."""
        now = (
            [{**group, "lr": rate} for group in options_of(self.optimizer)]
            if self.optimizer
            else []
        )
        before = [{**group, "lr": rate} for group in self._built_with]
        return now if now != before else None


@frozen(eq=False)
class Beginning:
    """Where a step began: what is drawn, and which exchange comes first."""

    exchanges: int
    states: Sequence[torch.Tensor]
    noise: Sequence[torch.Tensor]  # of each defense

    @classmethod
    def of(cls, party: DataParty) -> Beginning:
        """The present, before a step."""
        noise = [party.defenses.generator_of(d).get_state() for d in party.defenses.each]
        return cls(party.exchanges, random_states(party.model.device), noise)

    def restore(self, party: DataParty) -> None:
        """Begin the step anew: both parties drop its gradients, and draw what they drew, but for noise without a seed."""
        party.connection.abandon(self.exchanges)
        party.begin_step()
        for weight in party.parameters():
            weight.grad = None
        set_random_states(self.states)
        party.defenses.rewind(self.noise)


class Scaling:
    """The scale of a `GradScaler`, which grows and shrinks by what both parties found.

    The scaler is asked about a vote of its own instead of the data party's gradients, which are half of all.
    """

    def __init__(self, scaler: torch.amp.GradScaler) -> None:
        self._scaler = scaler
        self._vote = torch.zeros(1, requires_grad=True, device=scaler._device)
        self._optimizer = torch.optim.SGD([self._vote], lr=0.0)
        self._scaler.scale(self._vote.detach())  # makes the scale, which is lazy

    @property
    def scale(self) -> float:
        """What the loss is multiplied with."""
        return self._scaler.get_scale()

    def update(self, *, overflow: bool) -> None:
        """Tell the scaler how the step went."""
        self._vote.grad = torch.full_like(self._vote, float("inf") if overflow else 0.0)
        self._scaler.unscale_(self._optimizer)
        self._scaler.update()


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
