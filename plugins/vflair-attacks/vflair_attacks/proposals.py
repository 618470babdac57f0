"""In which order a search tries candidates, and how near one must come to be the token before all were tried."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from attrs import frozen
from torch import Tensor

from vflair_attacks.descent import Budget
from vflair_attacks.inverter import through_head
from vflair_attacks.learning import padded, tokens_of
from vflair_attacks.linear_inverter import LinearInverter, LinearMap, fitted
from vflair_attacks.matching import Measure
from vflair_core import AttackError, Head

Source = Literal["all", "prior", "linear", "prior+linear"]
SOURCES = ("all", "prior", "linear", "prior+linear")
NATS = 60.0  # what a cosine of 1 is worth beside the log-probability of a language model
FEWEST = 64  # candidates that are tried first
ROUNDING = 1e-4  # the distance that is accepted where there is no public text to measure it on
TEXTS, LENGTH = 4, 16  # of public text, to measure it
SURE_NATS = 10.0  # what a threshold must be away from both, to go by it
MOST_NATS = 50.0  # more than the true token ever cost there, and it is not taken for the token


@frozen(eq=False)
class Proposals:
    """The order of candidates: 60·cosine(linear map, embedding) + log p(language model), as far as either is there.

    Args:
        linear: From hidden states to embeddings, or None.
        prior: Whether the language model has a say.
        accept: The relative distance at which a candidate is taken for the token, with known noise the nats that it costs;
            0 for never before all were tried.
        most: Candidates that are tried at a position; 0 for all. Where nothing orders them (no position has gone before, and there is
            no map), all are.
        chunk: Most of them in one pass.
    """

    linear: LinearMap | None = None
    prior: bool = False
    accept: float = 0.0
    most: int = 0
    chunk: int = FEWEST

    def scored(
        self, observed: Tensor, said: Tensor | None, live: Tensor, head: Head, prefix: Any, measure: Measure,
        budget: Budget, positions: int, order: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Score candidates in order, for each example until one is near: (N, W, V), −∞ where none was tried.

        A budget is for all `positions` of the text: each tries some, and the best is taken where none is near.

        Args:
            observed: (R, N, D).
            said: log p of the language model (N, W, V), from the second position on.
            live: Which hypotheses are searched: (N, W), bool.
            head: Gives what candidates give.
            prefix: The hypotheses as the head has read them, N·W of them.
            measure: Compares.
            budget: Says how many may be tried, and is told how many were.
            positions: Of the longest example.
            order: In which order of the coordinates (N, D) the map reads what was observed; None for that of the head, or
                if the measure holds in any order: not known, and the map has no say.
        """
        (count, width), vocabulary, device = live.shape, len(head.embeddings), observed.device
        states: Tensor | None = observed.mean(0)
        if measure.in_any_order:
            states = None if order is None else observed.mean(0).gather(-1, order)
        first = self.first(states, said, vocabulary, prefix.length).to(device)
        # Where nothing is read yet, what is tried for one example holds for all.
        alike = not prefix.length and first.shape[0] == 1
        first = first.expand(count, width, -1).flatten(0, 1)
        scores = torch.full((count * width, vocabulary), -torch.inf, device=device)
        rows = live.flatten().nonzero().flatten()
        if len(rows) < len(first):
            prefix = prefix.of(rows)
        done, most, spent = 0, self.most or vocabulary, 0
        fewest = FEWEST * len(rows) / count
        purse = count * budget.allowance(prefix.length, positions, fewest)
        mapped = self.linear is not None and states is not None
        ordered = mapped or (self.prior and said is not None)
        if not ordered and count * budget.left >= vocabulary:
            # A part of what is in no order is as good as none, and all are tried once for all examples.
            most, purse = vocabulary, math.inf
        while len(rows) and done < most:
            cost = 1 if alike else len(rows)
            affordable = max(purse - spent, 0) / cost
            if done and affordable < 1:
                break
            more = int(max(min(max(done, FEWEST), self.chunk, most - done, affordable), 1))
            tried = first[rows, done : done + more]  # (rows, C)
            hidden = head.try_tokens(tried[:1] if alike else tried, prefix)
            seen = observed[:, rows // width, None]  # (R, rows, 1, D)
            found = torch.stack([measure.score(each, hidden) for each in seen]).sum(0)
            scores[rows[:, None], tried] = found
            done, spent = done + more, spent + len(hidden) * more
            if self.accept:
                near = (measure.off(found, seen) < self.accept).any(1)
                going = ~torch.isin(rows // width, rows[near] // width)
                if not bool(going.all()):
                    rows, prefix = rows[going], prefix.of(going.nonzero().flatten())
        budget.spend_unevenly(spent, count)
        return scores.unflatten(0, (count, width))

    def first(
        self, states: Tensor | None, said: Tensor | None, vocabulary: int, position: int
    ) -> Tensor:
        """Order all tokens for each row (N, D), with log p (N, W, V) if a model said it: (N, W, V) or less."""
        scores = said if self.prior else None
        if self.linear is not None and states is not None:
            place = torch.full((len(states),), position, device=states.device)
            cosines = NATS * self.linear.cosines(states, place)[:, None]
            scores = cosines if scores is None else scores + cosines
        if scores is None:
            return torch.arange(vocabulary)[None, None]
        return scores.argsort(dim=-1, descending=True)


class Options(Protocol):
    """What an attack says of its proposals."""

    @property
    def proposals(self) -> Source: ...
    @property
    def candidates(self) -> int: ...
    @property
    def accept(self) -> float: ...
    @property
    def chunk(self) -> int: ...


def proposals_of(
    plan: Options,
    measure: Measure,
    head: Head,
    known: Any,
    model: Any,
    tokenizer: Any,
    public_texts: Sequence[str],
    generator: torch.Generator | None = None,
) -> Proposals | None:
    """Make the proposals that an attack was told to use of what it was granted; None to try all tokens.

    `plan` has the options; `known` is the mechanism, or None. Through it public text shows how near the true token comes (`calibrated`).

    Raises:
        AttackError: What they are made of is not granted.
    """
    source = plan.proposals
    if source == "all":
        return None
    read = tokenizer is not None and len(public_texts) > 0
    there = {"all": True, "prior": model is not None, "linear": read}
    there["prior+linear"] = there["prior"] and there["linear"]
    if not there[source]:
        possible = ", ".join(f'"{name}"' for name, granted in there.items() if granted)
        raise AttackError(
            f'proposals = "{source}" takes the pretrained model of a causal-lm for "prior", tokenizer and public texts '
            f'for "linear" (K2 grants all three). With what is granted here it can be {possible}.'
        )
    linear, generator = None, generator or torch.Generator()
    rows = tokens_of(tokenizer, public_texts, LinearInverter().length) if read else []
    if "linear" in source:
        draw = through_head(head, rows, known, generator)
        linear, _, _ = fitted(draw, len(rows), head.vectors(), LinearInverter())
    accept = plan.accept
    if not accept and rows:
        accept = calibrated(head, measure, known, rows, linear, generator)
    elif not accept and measure.noise != "known":
        accept = ROUNDING
    return Proposals(linear, "prior" in source, accept, plan.candidates, plan.chunk)


@torch.no_grad()
def calibrated(
    head: Head,
    measure: Measure,
    known: Any,
    rows: Sequence[Tensor],
    linear: LinearMap | None,
    generator: torch.Generator,
) -> float:
    """Return the distance that tells true tokens from wrong ones on public text, or 0 if there is none.

    It lies between the farthest true token and the nearest of the wrong ones that come first: half way in logarithms, and
    the wrong ones must be ten times as far, or a search had better look at all. With known noise distances are nats that
    a token costs, and it lies half way, but at most `MOST_NATS` beyond the true ones.
    """
    texts = [row[:LENGTH] for row in sorted(rows, key=len, reverse=True)[:TEXTS]]
    ids, real = (part.to(head.device) for part in padded(texts))
    seen, _ = through_head(head, texts, known, generator)(torch.arange(len(texts)))
    prefix, proposals = head.cache(), Proposals(linear)
    farthest, nearest = torch.finfo(seen.dtype).eps, float("inf")
    for position in range(ids.shape[1]):
        true, observed = ids[:, position : position + 1].clamp_min(0), seen[:, position]
        first = proposals.first(observed, None, len(head.embeddings), position)[:, 0, :FEWEST]
        first = first.expand(len(true), -1)
        tried = torch.cat([true, first], dim=1)  # (B, 1 + FEWEST)
        hidden = head.try_tokens(tried, prefix)
        off = measure.off(measure.score(observed[:, None], hidden), observed[None, :, None])
        off, wrong = off[real[:, position]], (first != true)[real[:, position]]
        farthest = max(farthest, float(off[:, 0].max()))
        nearest = min(nearest, float(off[:, 1:][wrong].min()))
        head.append(true, prefix)
    if measure.noise == "known":
        gap = nearest - farthest
        return farthest + min(gap / 2, MOST_NATS) if gap > 2 * SURE_NATS else 0.0
    return float((farthest * nearest) ** 0.5) if nearest > 10 * farthest else 0.0
