"""What learned attacks share: public text as tokens, a network from hidden states to tokens, and its training."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from attrs import frozen
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

from vflair_attacks.descent import Budget
from vflair_core import AttackError

Kind = Literal["mlp", "gru"]
NOT_LEARNT = -100
# A batch: hidden states (B, T, D), tokens (B, T) with -100 on padding.
Draw = Callable[[Tensor], tuple[Tensor, Tensor]]


class Inverter(nn.Module):
    """Hidden states (B, T, D) to logits over tokens (B, T, V): a GRU in both directions, or each row by itself.

    With an embedding table (V, D') it learns to point at embeddings, so that tokens which public text hardly has
    are found as well; without, at a token each. `fit_scale` takes each coordinate's mean and spread from a batch: deep
    hidden states have a few huge ones.
    """

    mean: Tensor
    spread: Tensor
    table: Tensor | None

    def __init__(
        self, kind: Kind, width: int, hidden: int, vocabulary: int, table: Tensor | None = None
    ) -> None:
        super().__init__()
        self.register_buffer("table", None if table is None else _standardised(table))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("spread", torch.ones(width))
        self.first = nn.Sequential(nn.Linear(width, hidden), nn.GELU())
        self.memory = (
            nn.GRU(hidden, hidden, batch_first=True, bidirectional=True) if kind == "gru" else None
        )
        pointed = vocabulary if table is None else table.shape[1]
        self.last = nn.Linear(3 * hidden if kind == "gru" else hidden, pointed)

    def fit_scale(self, rows: Tensor) -> None:  # (rows, D)
        """Take mean and spread of each coordinate."""
        self.mean, self.spread = rows.mean(0), rows.std(0).clamp_min(1e-6)

    def forward(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        inner = self.first((hidden - self.mean) / self.spread)
        if self.memory is not None:
            packed = pack_padded_sequence(
                inner, lengths.cpu(), batch_first=True, enforce_sorted=False
            )
            states, _ = pad_packed_sequence(
                self.memory(packed)[0], batch_first=True, total_length=hidden.shape[1]
            )
            inner = torch.cat([inner, states], dim=-1)
        pointing: Tensor = self.last(inner)
        return pointing if self.table is None else pointing @ self.table.T


def _standardised(table: Tensor) -> Tensor:
    """Embeddings around their mean, of norm √D' each: as if drawn from N(0, 1)."""
    centred = table.detach() - table.detach().mean(0)
    return normalize(centred, dim=-1) * table.shape[1] ** 0.5


@frozen
class Schedule:
    """How a network learns: Adam, the rate falling along half a cosine, the best on held-out text kept."""

    steps: int
    batch: int
    rate: float
    held_out: float
    check_every: int = 50


def tokens_of(tokenizer: Any, texts: Sequence[str], length: int) -> list[Tensor]:
    """Return each text as token ids, cut to `length`, those without a token left out.

    Raises:
        AttackError: There are fewer than two texts: one to learn from and one held out.
    """
    rows = tokenizer(list(texts), truncation=True, max_length=length)["input_ids"] if texts else []
    found = [torch.tensor(row) for row in rows if row]
    if len(found) < 2:
        raise AttackError(
            f"A learned inverter needs public texts, and there are {len(found)} that are not empty. Give the "
            "task public text."
        )
    return found


def padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return token ids (B, T) with -100 on padding, and the mask (B, T)."""
    ids = pad_sequence(list(rows), batch_first=True, padding_value=NOT_LEARNT)
    return ids, ids != NOT_LEARNT


def learn(
    network: nn.Module,
    draw: Draw,
    count: int,
    schedule: Schedule,
    generator: torch.Generator,
    budget: Budget,
    tell: Callable[[int, int, float], None] = lambda *_: None,
) -> float:
    """Train `network` on what `draw` gives for numbers of examples below `count`; return its held-out loss.

    A share of the examples is held out; the network ends with the weights that did best on it. `tell` hears
    (step, steps, held-out loss).
    """
    order = torch.randperm(count, generator=generator)
    held = order[: max(1, int(schedule.held_out * count))]
    rest = order[len(held) :]
    optimizer = torch.optim.Adam(network.parameters(), lr=schedule.rate)
    best, lowest = copy.deepcopy(network.state_dict()), math.inf
    with torch.enable_grad():
        for step in range(schedule.steps + 1):
            if step % schedule.check_every == 0 or step == schedule.steps or budget.spent:
                loss = _held_out(network, draw, held, schedule.batch)
                if loss < lowest:
                    best, lowest = copy.deepcopy(network.state_dict()), loss
                tell(step, schedule.steps, lowest)
                if step == schedule.steps or budget.spent:
                    break
            chosen = rest[torch.randint(len(rest), (schedule.batch,), generator=generator)]
            hidden, ids = draw(chosen)
            budget.spend(len(chosen))
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate * (1 + math.cos(math.pi * step / schedule.steps)) / 2
            optimizer.zero_grad(set_to_none=True)
            loss_of(network, hidden, ids).backward()
            optimizer.step()
    network.load_state_dict(best)
    network.eval().requires_grad_(False)
    return lowest


def loss_of(network: nn.Module, hidden: Tensor, ids: Tensor) -> Tensor:
    """Mean cross-entropy of the tokens over real positions."""
    logits = network(hidden, (ids != NOT_LEARNT).sum(1))
    return cross_entropy(logits.flatten(0, 1), ids.flatten(), ignore_index=NOT_LEARNT)


def _held_out(network: nn.Module, draw: Draw, held: Tensor, size: int) -> float:
    with torch.no_grad():
        sums = [(loss_of(network, *draw(part)), len(part)) for part in held.split(size)]
    return sum(float(loss) * number for loss, number in sums) / len(held)
