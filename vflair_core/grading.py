"""Grading: only the core knows the truth. Every grade stands beside its floor and its two controls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import torch
from attrs import define, field, frozen
from torch import Tensor

from vflair_core.attack import Guess
from vflair_core.errors import AttackError

LEVEL = 0.95  # of all intervals
RESAMPLES = 2000


@frozen(eq=False)
class Truth:
    """What really was there: token ids, which of them are private, their texts and secrets, the labels."""

    tokens: list[Tensor]  # N times (T,)
    private: list[Tensor]  # N times (T,), bool
    texts: list[str] = field(factory=list)
    secrets: list[tuple[str, ...]] = field(factory=list)
    labels: Tensor | None = None  # (N,)


@define
class Grade:
    """How much an attack recovered: token accuracy over private positions, or label accuracy.

    `attack_performance` (AP) is what tables show. `floor` is the best of three guesses that use no message of the
    example. `verdict` is ``"ok"`` or says which control failed or that the attack was uninformative.
    """

    attack: str
    knowledge: str
    target: str  # "tokens" or "labels"
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
    tokens = _checked_tokens(guess, truth)
    hits = [_hits(row, t, p) for row, t, p in zip(tokens, truth.tokens, truth.private, strict=True)]
    accuracy = _pooled(hits)
    floors = {
        "constant": _constant_floor(truth),
        "prior": _pooled(_hits_of_prior(prior, truth)) if prior is not None else 0.0,
        "mismatched": mismatched(tokens, truth),
    }
    details = _token_details(tokens, truth, decode)
    return Grade(
        name,
        knowledge,
        "tokens",
        accuracy,
        interval(hits),
        max(floors.values()),
        floors,
        details,
        negative_control=floors["mismatched"],
        budget=dict(guess.budget or {}),
        recovered=[decode(row[row >= 0].tolist()) for row in tokens],
    )


def grade_labels(guess: Guess, truth: Truth, *, name: str, knowledge: str) -> Grade:
    """Grade a guess of labels; the floor is the largest class.

    Raises:
        AttackError: There are no labels to guess, or not one per victim.
    """
    if truth.labels is None:
        raise AttackError(f"{name} guesses labels, and this task has none.")
    labels = truth.labels
    details: dict[str, float] = {}
    if guess.scores is not None and set(labels.tolist()) <= {0, 1}:
        details["auc"] = auc(guess.scores, labels)
    guessed = guess.labels if guess.labels is not None else (guess.scores > 0).long()  # type: ignore[operator, union-attr]
    if guessed.shape != labels.shape:
        raise AttackError(
            f"{name} returned labels of shape {tuple(guessed.shape)} for {len(labels)} victims."
        )
    hits = _label_hits(guessed, labels)
    rolled = _mean_over_shifts(
        [_label_hits(guessed, labels.roll(shift)) for shift in range(1, len(labels))]
    )
    largest = max(torch.bincount(labels).tolist()) / len(labels)
    floors = {"constant": largest, "mismatched": rolled}
    return Grade(
        name, knowledge, "labels", _pooled(hits), interval(hits), max(floors.values()), floors, details,
        negative_control=rolled, budget=dict(guess.budget or {}),
    )  # fmt: skip


@frozen
class Reference:
    """What the same attack reached in the undefended arm, on the victims that cross again bypassed."""

    performance: float
    informative: bool


def judge(grade: Grade, reference: Reference | None, bypassed: float | None) -> Grade:
    """Add the controls' verdict to a grade.

    `bypassed` is the attack's performance on messages of this run sent with the defense bypassed, on the same
    victims as `reference`; both are None in the undefended arm.
    """
    grade.positive_control = bypassed
    others = max(grade.floors["constant"], grade.floors.get("prior", 0.0))
    undefended = grade.attack_performance if reference is None else reference.performance
    low, _ = grade.interval
    if grade.negative_control is not None and grade.negative_control > others + 0.1:
        grade.verdict = (
            f"negative control failed: {grade.negative_control:.3f} on other examples' messages"
        )
    elif bypassed is not None and bypassed < 0.95 * undefended:
        grade.verdict = (
            f"positive control failed: {bypassed:.3f} with the defense bypassed against {undefended:.3f} "
            "undefended, so the drop is not the defense's alone"
        )
    grade.informative = low > grade.floor if reference is None else reference.informative
    if grade.verdict == "ok" and not grade.informative:
        grade.verdict = "attack uninformative: it is at the floor without a defense"
    return grade


def subset_accuracy(guess: Guess, truth: Truth, rows: Sequence[int]) -> float:
    """Token (or label) accuracy on some victims only; `guess` has one row per chosen victim."""
    if guess.tokens is None:
        labels, guessed = truth.labels, guess.labels
        if guessed is None and guess.scores is not None:
            guessed = (guess.scores > 0).long()
        assert labels is not None  # grade_labels has checked both
        assert guessed is not None
        return float((guessed == labels[list(rows)]).float().mean())
    chosen = Truth([truth.tokens[n] for n in rows], [truth.private[n] for n in rows])
    tokens = _checked_tokens(guess, chosen)
    triples = zip(tokens, chosen.tokens, chosen.private, strict=True)
    return _pooled([_hits(row, t, p) for row, t, p in triples])


# -- the measures --------------------------------------------------------------------------------------


def _checked_tokens(guess: Guess, truth: Truth) -> list[Tensor]:
    tokens = guess.tokens
    if tokens is None or len(tokens) != len(truth.tokens):
        there = "none" if tokens is None else str(len(tokens))
        raise AttackError(f"The attack guessed tokens for {there} of {len(truth.tokens)} victims.")
    longest = max(len(t) for t in truth.tokens)
    if tokens.shape[1] < longest:
        missing = tokens.new_full((len(tokens), longest - tokens.shape[1]), -1)
        tokens = torch.cat([tokens, missing], dim=1)
    return [row[: len(t)] for row, t in zip(tokens, truth.tokens, strict=True)]


def _hits(guessed: Tensor, true: Tensor, private: Tensor) -> tuple[int, int]:
    return int(((guessed == true) & private).sum()), int(private.sum())


def _label_hits(guessed: Tensor, labels: Tensor) -> list[tuple[int, int]]:
    return [(int(hit), 1) for hit in (guessed == labels).tolist()]


def _pooled(hits: Sequence[tuple[int, int]]) -> float:
    return sum(h for h, _ in hits) / max(sum(n for _, n in hits), 1)


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
    return _mean_over_shifts(shifts)


def _mean_over_shifts(shifts: list[list[tuple[int, int]]]) -> float:
    return _pooled([pair for pairs in shifts for pair in pairs]) if shifts else 0.0


def interval(hits: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """Return the 95 % interval of the pooled accuracy: bootstrap over sentences, exact binomial at 0 and 1."""
    total, count = sum(h for h, _ in hits), sum(n for _, n in hits)
    if not count:
        return 0.0, 1.0
    tail = (1 - LEVEL) / 2
    sentences = len(hits)
    if total == 0:
        return 0.0, 1 - tail ** (1 / sentences)
    if total == count:
        return tail ** (1 / sentences), 1.0
    table = torch.tensor(hits, dtype=torch.float64)
    draws = torch.randint(
        sentences, (RESAMPLES, sentences), generator=torch.Generator().manual_seed(0)
    )
    sums = table[draws].sum(1)  # (resamples, 2)
    rates = (sums[:, 0] / sums[:, 1].clamp_min(1)).sort().values
    low, high = round(tail * RESAMPLES), round((1 - tail) * RESAMPLES) - 1
    return float(rates[low]), float(rates[high])


def _token_details(tokens: list[Tensor], truth: Truth, decode: Any) -> dict[str, float]:
    """Over private positions: exact sequences, ROUGE-L, VFLAIR-LLM's bag measures. Over all: planted strings found."""
    triples = zip(tokens, truth.tokens, truth.private, strict=True)
    pairs = [(g[p], t[p]) for g, t, p in triples if p.any()]
    count = max(len(pairs), 1)
    bags = [_bag(g, t) for g, t in pairs]
    details = {
        "exact_sequences": sum(bool((g == t).all()) for g, t in pairs) / count,
        "rouge_l": sum(rouge_l(g[g >= 0].tolist(), t.tolist()) for g, t in pairs) / count,
        "bag_recall": sum(r for r, _ in bags) / count,
        "bag_precision": sum(p for _, p in bags) / count,
    }
    planted = [
        (g, secret) for g, secrets in zip(tokens, truth.secrets, strict=False) for secret in secrets
    ]
    if planted:
        texts = {id(g): decode(g[g >= 0].tolist()) for g, _ in planted}
        found = sum(secret in texts[id(g)] for g, secret in planted)
        details["planted_strings_recovered"] = found / len(planted)
    return details


def _bag(guessed: Tensor, true: Tensor) -> tuple[float, float]:
    """Order ignored, as VFLAIR-LLM measures: recall over true tokens, precision over guessed ones."""
    there, said = set(true.tolist()), set(guessed.tolist())
    recall = sum(t in said for t in true.tolist()) / max(len(true), 1)
    precision = sum(g in there for g in guessed.tolist()) / max(len(guessed), 1)
    return recall, precision


def rouge_l(guessed: Sequence[int], true: Sequence[int]) -> float:
    """F1 of the longest common subsequence of two token sequences (Lin, 2004)."""
    if not guessed or not true:
        return 0.0
    row = [0] * (len(true) + 1)
    for g in guessed:
        diagonal = 0
        for n, t in enumerate(true, start=1):
            above = row[n]
            row[n] = diagonal + 1 if g == t else max(row[n - 1], above)
            diagonal = above
    common = row[-1]
    return 2 * common / (len(guessed) + len(true))


def auc(scores: Tensor, labels: Tensor) -> float:
    """Probability that an example of class 1 scores above one of class 0; ties count half."""
    positive, negative = scores[labels == 1], scores[labels == 0]
    if not len(positive) or not len(negative):
        raise AttackError("AUC needs victims of both classes.")
    above = (positive[:, None] > negative).double() + 0.5 * (positive[:, None] == negative).double()
    return float(above.mean())
