"""Move the data party's weights away from the published ones before private text is touched, and keep them there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from attrs import define, field, validators
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from vflair_core import Defense, DefenseError, Exchange, Mechanism
from vflair_defenses.rows import public_ids

if TYPE_CHECKING:
    from vflair_core import Party


@define(slots=False)
class DualGuard(Defense):
    """Warm up head and tail on public text so that hidden states leave their published directions, and retain that.

    After Liu et al., "DualGuard: A Parameter Space Transformation Approach for Bidirectional Defense in Split-Based
    LLM Fine-Tuning", ACL 2025 (2025.acl-long.835): a local warm-up that trades privacy against the task, and retention in
    fine-tuning. Written from its abstract; the terms are ours. Warm-up: the data party's trainable weights minimise
    L(public text) + weight · mean max(0, cos(h, h⁰)), h⁰ the published head's row; the model party computes and
    steps nowhere. Fine-tuning: + retention · ‖θ − θ'‖², θ' the warmed-up weights. What protects is that the weights are
    secret: against who has only the published head (K2). Who has the current one (K3) reads as before, and so does
    an inverter that may ask the pipeline; no guarantee. The victims' messages with the defense bypassed come from
    the moved weights too, so positive controls at K2 fail by design.

    Attributes:
        weight: Of the cosine in the warm-up; 0 warms up and retains nothing.
        retention: Of the squared distance to the warmed-up weights, in fine-tuning.
        steps: Steps of the warm-up, a public text each.
        rate: Its learning rate (Adam).
    """

    weight: float = field(default=1.0, validator=validators.ge(0))
    retention: float = field(default=1e-3, validator=validators.ge(0))
    steps: int = field(default=200, validator=validators.ge(1))
    rate: float = field(default=1e-3, validator=validators.gt(0))
    _kept: dict[str, Tensor] = field(init=False, factory=dict, eq=False)
    _trained: dict[str, nn.Parameter] = field(init=False, factory=dict, eq=False)
    _sent: Tensor | None = field(init=False, default=None, eq=False)
    _warming: bool = field(init=False, default=False, eq=False)

    covers = frozenset({"prompt", "response"})
    supports = frozenset({("*", "causal-lm", "*")})

    def prepare(self, public_texts: Sequence[str], data_party: Party) -> None:
        """Warm up: rounds on public text, whose steps the data party takes alone.

        What was restored by `load_state` is retained as it is, and not warmed up again.
        """
        if not self.weight:
            return
        data_party.defenses.check("train")
        weights = data_party.model.named_parameters()
        self._trained = {name: weight for name, weight in weights if weight.requires_grad}
        if not self._trained:
            raise DefenseError(
                "DualGuard moves the data party's weights, and none of them is trainable. Train them "
                "(train.trainable, LoRA), or use another defense."
            )
        if self._kept:
            return

        def make() -> dict[str, Tensor]:
            self._warm_up(public_ids("DualGuard", public_texts, data_party), data_party)
            return {name: w.detach().clone() for name, w in self._trained.items()}

        made = data_party.remember(self, public_texts, make, noise=data_party.defenses.randomness)
        for name, weight in self._trained.items():
            weight.data.copy_(made[name])
        self._kept = {name: w.detach().clone() for name, w in self._trained.items()}
        # They drew noise for it, or not: it may have been kept.
        for defense in data_party.defenses.each:
            data_party.defenses.begin_anew(defense)

    def _warm_up(self, texts: Sequence[Tensor], data_party: Party) -> None:
        with torch.no_grad():
            published = [data_party.smashed(input_ids=ids, use_cache=False) for ids in texts]
        optimizer = torch.optim.Adam(self._trained.values(), self.rate)
        training, self._warming = data_party.model.training, True
        data_party.model.eval()  # no dropout: each step compares with the same rows
        try:
            with data_party.public_text():
                for number in range(self.steps):
                    data_party.tell(self, number, self.steps)
                    at = number % len(texts)
                    self._step(data_party, texts[at], published[at], optimizer)
        finally:
            self._warming, self._sent = False, None
            data_party.model.train(training)
            data_party.model.zero_grad(set_to_none=True)

    def _step(
        self, party: Party, ids: Tensor, published: Tensor, optimizer: torch.optim.Optimizer
    ) -> None:
        weights = list(self._trained.values())
        with torch.enable_grad():
            loss = party.model(input_ids=ids, labels=ids, use_cache=False).loss
            assert self._sent is not None  # `on_smashed` ran in this very call
            alike = cosine_similarity(self._sent.float(), published.float(), dim=-1)
            loss = loss + self.weight * alike.clamp(min=0).mean()
            # Not `backward`: that would leave gradients at the model party.
            gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        optimizer.step()

    def on_smashed(self, smashed: Tensor, exchange: Exchange) -> Tensor:  # (B, T, D)
        if self._warming:
            self._sent = smashed
        return smashed

    def penalty(self, exchange: Exchange) -> Tensor | None:
        """What it costs to go back."""
        if not (self._kept and self.retention) or self._warming:
            return None
        if not self._trained:
            raise DefenseError(
                "DualGuard was restored and does not hold the model's weights yet: call prepare([], data_party)."
            )
        apart = [
            (weight - self._kept[name].to(weight.device)).square().sum()
            for name, weight in self._trained.items()
            if weight.requires_grad
        ]
        return self.retention * torch.stack(apart).sum() if apart else None

    def mechanism(self) -> Mechanism:
        """The weights are all there is to know: who has the current head has it."""
        return Mechanism()

    def state(self) -> dict[str, Tensor]:
        return dict(self._kept)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._kept = dict(state)
