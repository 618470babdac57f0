"""Grading of tokens: only the core knows the truth. Every grade stands beside its floor and its two controls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import torch
from attrs import define, field, frozen
from torch import Tensor

from vflair_core.attack import Guess
from vflair_core.errors import AttackError
from vflair_core.measures import bag, interval, mean_over_shifts, pooled, rouge_l


@frozen(eq=False)
class Truth:
    """What really was there. It stays in the core's process.

    Args:
        tokens: Token ids of each victim, N times (T,).
        private: Which of them are private, N times (T,), bool.
        texts: The victims as text.
        secrets: Their planted strings.
        labels: Their classes (N,), if they have any.
        answers: Which tokens are an answer that the model learns, N times (T,), bool; none in bare texts.
        known: Victims whose labels the attacker was told; they are not graded.
        members: For each membership candidate (M,) the victim it is, or -1.
    """

    tokens: list[Tensor]  # N times (T,)
    private: list[Tensor]  # N times (T,), bool
    texts: list[str] = field(factory=list)
    secrets: list[tuple[str, ...]] = field(factory=list)
    labels: Tensor | None = None
    answers: list[Tensor] = field(factory=list)
    known: frozenset[int] = frozenset()
    members: Tensor | None = None


@define
class Grade:
    """How much an attack recovered: the rate of right answers about its `target`.

    `attack_performance` (AP) is what tables show. `floor` is the best of three guesses that use no message of the
    example. `verdict` is ``"ok"`` or says which control failed or that the attack was uninformative.
    """

    attack: str
    knowledge: str
    target: str  # "tokens", "labels", "answers" or "members"
    attack_performance: float
    interval: tuple[float, float]
    floor: float
    floors: dict[str, float]
    details: dict[str, float]
    positive_control: float | None = None
    negative_control: float | None = None
    verdict: str = "ok"
    budget: dict[str, float] = field(factory=dict)
    reference: float = 0.0  # performance on the victims that also cross with the defense bypassed
    seconds: float = 0.0
    informative: bool = True  # above its floor where nothing defends
    recovered: list[str] = field(factory=list)  # the guesses as text; not among the numbers

    def to_dict(self) -> dict[str, Any]:
        """As plain values for a result file, without the recovered texts."""
        return attrs.asdict(self, filter=lambda attribute, _: attribute.name != "recovered")


def grade_tokens(
    guess: Guess, truth: Truth, prior: Tensor | None, decode: Any, *, name: str, knowledge: str
) -> Grade:
    """Grade a guess of tokens. `prior` (T,) is the best guess of someone who saw no message.

    Raises:
        AttackError: The guess has not one row per victim, or ids that no tokenizer made.
    """
    tokens = checked_tokens(guess, truth)
    hits = token_hits(tokens, truth)
    floors = {
        "constant": _constant_floor(truth),
        "prior": pooled(_hits_of_prior(prior, truth)) if prior is not None else 0.0,
        "mismatched": mismatched(tokens, truth),
    }
    details = _token_details(tokens, truth, decode)
    return Grade(
        name,
        knowledge,
        "tokens",
        pooled(hits),
        interval(hits),
        max(floors.values()),
        floors,
        details,
        negative_control=floors["mismatched"],
        budget=dict(guess.budget or {}),
        recovered=[decode(row[row >= 0].tolist()) for row in tokens],
    )


def checked_tokens(guess: Guess, truth: Truth) -> list[Tensor]:
    """Return one row of guessed ids per victim, as long as the victim, -1 where nothing was guessed."""
    tokens = guess.tokens
    if tokens is None or len(tokens) != len(truth.tokens):
        there = "none" if tokens is None else str(len(tokens))
        raise AttackError(f"The attack guessed tokens for {there} of {len(truth.tokens)} victims.")
    longest = max(len(t) for t in truth.tokens)
    if tokens.shape[1] < longest:
        missing = tokens.new_full((len(tokens), longest - tokens.shape[1]), -1)
        tokens = torch.cat([tokens, missing], dim=1)
    return [row[: len(t)] for row, t in zip(tokens, truth.tokens, strict=True)]


def token_hits(tokens: Sequence[Tensor], truth: Truth) -> list[tuple[int, int]]:
    """Count right tokens at private positions, for each victim."""
    triples = zip(tokens, truth.tokens, truth.private, strict=True)
    return [_hits(row, t, p) for row, t, p in triples]


def _hits(guessed: Tensor, true: Tensor, private: Tensor) -> tuple[int, int]:
    return int(((guessed == true) & private).sum()), int(private.sum())


def _hits_of_prior(prior: Tensor, truth: Truth) -> list[tuple[int, int]]:
    longest = max(len(t) for t in truth.tokens)
    padded = torch.cat([prior, prior.new_full((max(longest - len(prior), 0),), -1)])
    return [_hits(padded[: len(t)], t, p) for t, p in zip(truth.tokens, truth.private, strict=True)]


def _constant_floor(truth: Truth) -> float:
    private = torch.cat([t[p] for t, p in zip(truth.tokens, truth.private, strict=True)])
    return float(torch.bincount(private).max()) / len(private) if len(private) else 0.0


def mismatched(tokens: Sequence[Tensor], truth: Truth) -> float:
    """Grade each guess against every other example: what the attack gets without the right message."""
    count = len(tokens)
    shifts = []
    for shift in range(1, count):
        pairs = []
        for n in range(count):
            other, private = truth.tokens[(n + shift) % count], truth.private[(n + shift) % count]
            guessed = torch.full_like(other, -1)
            overlap = min(len(guessed), len(tokens[n]))
            guessed[:overlap] = tokens[n][:overlap]
            pairs.append(_hits(guessed, other, private))
        shifts.append(pairs)
    return mean_over_shifts(shifts)


def _token_details(tokens: list[Tensor], truth: Truth, decode: Any) -> dict[str, float]:
    """Over private positions: exact sequences, ROUGE-L, VFLAIR-LLM's bag measures.

    Over all: planted strings found. Apart: tokens of answers, which are no private positions.
    """
    triples = zip(tokens, truth.tokens, truth.private, strict=True)
    pairs = [(g[p], t[p]) for g, t, p in triples if p.any()]
    count = max(len(pairs), 1)
    bags = [bag(g, t) for g, t in pairs]
    details = {
        "exact_sequences": sum(bool((g == t).all()) for g, t in pairs) / count,
        "rouge_l": sum(rouge_l(g[g >= 0].tolist(), t.tolist()) for g, t in pairs) / count,
        "bag_recall": sum(r for r, _ in bags) / count,
        "bag_precision": sum(p for _, p in bags) / count,
    }
    if any(bool(there.any()) for there in truth.answers):
        quads = zip(tokens, truth.tokens, truth.answers, strict=True)
        details["answer_tokens"] = pooled([_hits(g, t, there) for g, t, there in quads])
    planted = [
        (g, secret) for g, secrets in zip(tokens, truth.secrets, strict=False) for secret in secrets
    ]
    if planted:
        texts = {id(g): decode(g[g >= 0].tolist()) for g, _ in planted}
        found = sum(secret in texts[id(g)] for g, secret in planted)
        details["planted_strings_recovered"] = found / len(planted)
    return details
