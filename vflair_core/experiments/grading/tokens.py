"""Grading of tokens, each beside its floor and its two controls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vflair_core.attacks.attack import Guess
from vflair_core.errors import AttackError
from vflair_core.experiments.grading.grades import Grade
from vflair_core.experiments.grading.matching import matched, together
from vflair_core.experiments.grading.statistics import (
    Floor,
    Hits,
    bag_overlap,
    chance_of_no_more,
    interval,
    longest_common_subsequence,
    pooled,
    rouge_l,
)
from vflair_core.experiments.grading.truth import Truth


def grade_tokens(
    guess: Guess,
    truth: Truth,
    prior: Tensor | None,
    decode: Any,
    *,
    name: str,
    knowledge: tuple[str, ...],
) -> Grade:
    """Grade a guess of tokens. `prior` (T,) is the best guess of someone who saw no message.

    Raises:
        AttackError: The guess has not one row per victim, or ids that no tokenizer made.
    """
    tokens = checked_tokens(guess, truth)
    hits = together(token_hits(tokens, truth), truth.update_batch)
    each = _floors(tokens, truth, prior)
    count = sum(of for _, of in hits)
    floors = {name: floor.rate(count) for name, floor in each.items()}
    details = _token_details(tokens, truth, decode)
    if truth.originals:
        sent = [(int((g == t).sum()), len(t)) for g, t in zip(tokens, truth.tokens, strict=True)]
        details["sent_tokens"] = pooled(sent)
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
        hits=hits,
        by_chance=chance_of_no_more(hits, each[max(floors, key=lambda name: floors[name])]),
    )


def checked_tokens(guess: Guess, truth: Truth) -> list[Tensor]:
    """Return one row of guessed ids per victim, as long as the victim, -1 where nothing was guessed.

    Of victims that share an update each gets the row that fits it best.
    """
    tokens = guess.tokens
    if tokens is None or len(tokens) != len(truth.tokens):
        rows = "none" if tokens is None else str(len(tokens))
        raise AttackError(f"The attack guessed tokens for {rows} of {len(truth.tokens)} victims.")
    longest = max(len(t) for t in truth.places or truth.tokens)
    if tokens.shape[1] < longest:
        missing = tokens.new_full((len(tokens), longest - tokens.shape[1]), -1)
        tokens = torch.cat([tokens, missing], dim=1)

    def fit(row: int, n: int) -> float:
        return _fit(_looked_at(tokens[row], truth, n), truth, n)

    pairs = matched(len(tokens), truth.update_batch, fit)
    return [_looked_at(tokens[row], truth, n) for row, n in pairs]


def _looked_at(row: Tensor, truth: Truth, n: int) -> Tensor:
    """What a row says of one victim: as long as what is true of it."""
    if truth.places:
        return row[: len(truth.places[n])][truth.places[n]]
    return row[: len(truth.tokens[n])]


def token_hits(tokens: Sequence[Tensor], truth: Truth) -> list[tuple[int, int]]:
    """Count what is right of each victim's private text.

    Where what was sent is what there was: tokens at their positions. Where a defense changed the text, positions are
    another text's, and so are private spans: then the private tokens of the original that the guess has in their
    order (longest common subsequence).
    """
    return [_hits_of(row, truth, n) for n, row in enumerate(tokens)]


def _hits_of(guessed: Tensor, truth: Truth, n: int) -> tuple[int, int]:
    """Count what a row of any length has right of one victim."""
    if truth.originals:
        return _in_order(guessed, truth.originals[n])
    return _hits(_as_long(guessed, truth.tokens[n]), truth.tokens[n], truth.private[n])


def _fit(guessed: Tensor, truth: Truth, n: int) -> float:
    """How well a row fits one victim: by what is graded, and where that is equal by all tokens that were sent."""
    sent = truth.tokens[n]
    row = _as_long(guessed, sent)
    right, _ = _hits_of(row, truth, n)
    return right + int((row == sent).sum()) / (1 + sum(len(t) for t in truth.tokens))


def _as_long(guessed: Tensor, true: Tensor) -> Tensor:
    """The row cut or filled with -1 to the length of what was sent."""
    row = torch.full_like(true, -1)
    overlap = min(len(row), len(guessed))
    row[:overlap] = guessed[:overlap]
    return row


def _hits(guessed: Tensor, true: Tensor, private: Tensor) -> tuple[int, int]:
    return int(((guessed == true) & private).sum()), int(private.sum())


def _private(tokens: Sequence[Tensor], truth: Truth) -> list[Tensor]:
    return [row[private] for row, private in zip(tokens, truth.private, strict=True)]


def _in_order(guessed: Tensor, original: Tensor) -> tuple[int, int]:
    return longest_common_subsequence(guessed.tolist(), original.tolist()), len(original)


def _floors(tokens: Sequence[Tensor], truth: Truth, prior: Tensor | None) -> dict[str, Floor]:
    """What guesses reach that use no message of the example."""
    size = truth.update_batch
    floors = {"constant": Floor.over([_constant_guess(truth)], size), "prior": Floor(())}
    floors["mismatched"] = Floor.over(mismatched(tokens, truth), size)
    if prior is not None:
        longest = max(len(t) for t in truth.places or truth.tokens)
        padded = torch.cat([prior, prior.new_full((max(longest - len(prior), 0),), -1)])
        said = [_looked_at(padded, truth, n) for n in range(len(truth.tokens))]
        floors["prior"] = Floor.over([token_hits(said, truth)], size)
    # Texts have words in common, in their order, as answers have; and the best of several orders suits any text a little.
    if truth.originals or truth.places or size > 1:
        floors["others"] = Floor.over(mismatched(truth.tokens, truth), size)
    return floors


def _constant_guess(truth: Truth) -> Hits:
    """Hits of the best token, or whole answer, that is the same for all."""
    each = [_one_token(truth), *(_whole_answers(truth) if truth.places else ())]
    return max(each, key=pooled)


def _whole_answers(truth: Truth) -> list[Hits]:
    different = dict.fromkeys(tuple(row.tolist()) for row in truth.tokens)
    return [token_hits([torch.tensor(answer)] * len(truth.tokens), truth) for answer in different]


def _one_token(truth: Truth) -> Hits:
    private = truth.originals or _private(truth.tokens, truth)
    every = torch.cat(list(private))
    said = int(torch.bincount(every).argmax()) if len(every) else -1
    return [(int((row == said).sum()), len(row)) for row in private]


def mismatched(tokens: Sequence[Tensor], truth: Truth) -> list[Hits]:
    """Grade each guess against every other example: what the attack gets without the right message.

    Of victims that share an update, against those of every other update, in the order that fits best.
    """
    count, size = len(tokens), truth.update_batch
    shifts: list[Hits] = []
    for shift in range(1, count // size):
        pairs = matched(count, size, lambda row, n: _hits_of(tokens[row], truth, n)[0], shift)
        shifts.append([_hits_of(tokens[row], truth, n) for row, n in pairs])
    return shifts


def _token_details(tokens: list[Tensor], truth: Truth, decode: Any) -> dict[str, float]:
    """Of the private text: exact sequences, ROUGE-L, VFLAIR-LLM's bag measures, and how much had no guess, if any.

    Over all: planted strings found.
    """
    true = truth.originals or _private(truth.tokens, truth)
    guessed = tokens if truth.originals else _private(tokens, truth)
    pairs = [(g, t) for g, t in zip(guessed, true, strict=True) if len(t)]
    count = max(len(pairs), 1)
    bags = [bag_overlap(g, t) for g, t in pairs]
    details = {
        "exact_sequences": sum(right == of for right, of in token_hits(tokens, truth) if of)
        / count,
        "rouge_l": sum(rouge_l(g[g >= 0].tolist(), t.tolist()) for g, t in pairs) / count,
        "bag_recall": sum(r for r, _ in bags) / count,
        "bag_precision": sum(p for _, p in bags) / count,
    }
    if without := sum(int((g < 0).sum()) for g, _ in pairs):
        details["unanswered"] = without / sum(len(g) for g, _ in pairs)
    planted = [
        (g, secret) for g, secrets in zip(tokens, truth.secrets, strict=False) for secret in secrets
    ]
    if planted:
        texts = {id(g): decode(g[g >= 0].tolist()) for g, _ in planted}
        recovered = sum(secret in texts[id(g)] for g, secret in planted)
        details["planted_strings_recovered"] = recovered / len(planted)
    return details
