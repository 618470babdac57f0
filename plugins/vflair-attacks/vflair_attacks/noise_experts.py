"""Inverters for several strengths of noise, and a gate that weighs them: for noise of unknown strength."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vflair_attacks.descent import Budget, rms
from vflair_attacks.learning import Draw, Inverter, Schedule, learn, padded
from vflair_core import Head

HEADS = 4  # of the gate's attention, as in the paper


class Experts(nn.Module):
    """Logits of all experts, weighed for each text by a gate that reads its hidden states."""

    def __init__(self, experts: Sequence[Inverter], width: int) -> None:
        super().__init__()
        size = max(HEADS, width // HEADS * HEADS)
        self.experts = nn.ModuleList(experts)
        self.first = nn.Linear(width, size)
        self.attention = nn.MultiheadAttention(size, HEADS, batch_first=True)
        self.last = nn.Linear(size, len(experts))

    def forward(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        said = torch.stack([expert(hidden, lengths) for expert in self.experts])  # (E, B, T, V)
        return torch.einsum("be,ebtv->btv", self.weights(hidden, lengths), said)

    def weights(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        """How much each expert counts for each text: (B, E)."""
        expert: Any = self.experts[0]
        inner = self.first((hidden - expert.mean) / expert.spread)
        real = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]
        mixed, _ = self.attention(inner, inner, inner, key_padding_mask=~real, need_weights=False)
        pooled = (mixed * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        return self.last(pooled).softmax(-1)  # type: ignore[no-any-return]


def train_experts(
    experts: Experts,
    draw: Callable[[Sequence[float]], Draw],
    scales: Sequence[float],
    count: int,
    schedule: Schedule,
    generator: torch.Generator,
    budget: Budget,
    tell: Callable[[int, int, float], None],
) -> float:
    """Train each expert at its scale, then the gate, then all at scales drawn for each batch; return the loss.

    `draw(scales)` draws batches whose noise has one of these scales. The last two phases also see none and twice the
    largest.
    """
    for expert, scale in zip(experts.experts, scales, strict=True):
        loss = learn(expert, draw([scale]), count, schedule, generator, budget, tell)
    if len(scales) == 1:  # nothing to weigh
        return loss
    every = sorted({0.0, *scales, 2 * max(scales)})
    loss = learn(experts, draw(every), count, schedule, generator, budget, tell)
    experts.requires_grad_()
    return min(loss, learn(experts, draw(every), count, schedule, generator, budget, tell))


def through_noise(
    head: Head, rows: Sequence[Tensor], mechanism: Any, generator: torch.Generator
) -> Callable[[Sequence[float]], Draw]:
    """Draw text through the head with noise at the embeddings, in units of their rms, and the defense if known."""
    table = head.vectors()
    unit = rms(table)

    def at(scales: Sequence[float]) -> Draw:
        def draw(numbers: Tensor) -> tuple[Tensor, Tensor]:
            ids, real = (
                part.to(head.device) for part in padded([rows[n] for n in numbers.tolist()])
            )
            scale = scales[int(torch.randint(len(scales), (), generator=generator))]
            embeds = table[ids.clamp_min(0)]
            noise = torch.randn(embeds.shape, generator=generator).to(embeds)
            embeds = embeds + scale * unit * noise
            with torch.no_grad():
                if mechanism is not None:
                    embeds = mechanism.sample_embeddings(embeds, generator)
                hidden = head(inputs_embeds=embeds, attention_mask=real.long())
                if mechanism is not None:
                    hidden = mechanism.sample(hidden * real[..., None], generator)
            return hidden, ids

        return draw

    return at
