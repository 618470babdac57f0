"""How predictions are scored where a task does not say it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from vflair_core.tasks.collation import IGNORED
from vflair_core.tasks.task import Task


def standard_score(
    task: Task, predictions: Sequence[Any], truth: Sequence[Any]
) -> dict[str, float]:
    """Score by the core's own metric for the kind; the first one is MP.

    Args:
        task: Gives the kind.
        predictions: One for each example, as `Task.score` gets them.
        truth: Labels; (label, number of choices); every accepted text; or (T,) tokens to be said.
    """
    if task.kind == "classification":
        return {"accuracy": _share(a == b for a, b in zip(predictions, truth, strict=True))}
    if task.kind == "regression":
        return _regression(predictions, truth)
    if _judged_by_text(task):
        pairs = list(zip(predictions, truth, strict=True))
        return {
            "exact_match": _mean(_best(exact_match, text, accepted) for text, accepted in pairs),
            "token_f1": _mean(_best(token_f1, text, accepted) for text, accepted in pairs),
        }
    if task.answering == "choose":
        return {"accuracy": _share(a == b for a, (b, _) in zip(predictions, truth, strict=True))}
    right = total = 0
    for said, wanted in zip(predictions, truth, strict=True):
        learnt = wanted[1:] != IGNORED
        right += int(((said[:-1] == wanted[1:]) & learnt).sum())
        total += int(learnt.sum())
    return {"token_accuracy": right / max(total, 1)}


def chance_of(task: Task, truth: Sequence[Any]) -> float:
    """Return the MP of the best prediction that is the same for all examples, in [0, 1].

    The largest class, or 1 / choices if that is more; the mean label (R² = 0, as is any metric of correlation); "no
    answer" to every question; the empty text; the most frequent token. `truth` is as in `standard_score`.
    """
    if task.kind == "regression":
        return 0.0
    if _judged_by_text(task):
        return _main(task, [""] * len(truth), truth)
    if task.kind == "classification":
        return _main(task, [Counter(truth).most_common(1)[0][0]] * len(truth), truth)
    if task.answering == "choose":
        blind = _mean(1 / choices for _, choices in truth)
        most = Counter(label for label, _ in truth).most_common(1)[0][0]
        return max(blind, _main(task, [most] * len(truth), truth))
    tokens = torch.cat([wanted[1:][wanted[1:] != IGNORED] for wanted in truth])
    return float(torch.bincount(tokens).max()) / len(tokens) if len(tokens) else 0.0


def _main(task: Task, predictions: Sequence[Any], truth: Sequence[Any]) -> float:
    if task.score is None:
        scores: Mapping[str, float] = standard_score(task, predictions, truth)
    else:
        scores = task.score(predictions, task.test)
    value = float(next(iter(scores.values())))
    return min(max(value, 0.0), 1.0) if math.isfinite(value) else 0.0


def _judged_by_text(task: Task) -> bool:
    if task.kind == "question-answering":
        return True
    return task.kind in ("causal-lm", "seq2seq", "image-text") and task.answering == "write"


def _regression(predictions: Sequence[float], truth: Sequence[float]) -> dict[str, float]:
    said, wanted = (torch.tensor(values, dtype=torch.float64) for values in (predictions, truth))
    error = float((said - wanted).square().mean())
    variance = float(wanted.var(correction=0))
    return {"r2": max(0.0, 1 - error / variance) if variance else 0.0, "mean_squared_error": error}


def exact_match(said: str, wanted: str) -> float:
    """1 if both are the same text but for space around it, else 0: case, signs and articles count."""
    return float(said.strip() == wanted.strip())


def token_f1(said: str, wanted: str) -> float:
    """F1 of the words between spaces as they are written, order ignored; two empty answers agree."""
    ours, theirs = said.split(), wanted.split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def _best(measure: Callable[[str, str], float], said: str, accepted: Sequence[str]) -> float:
    return max(measure(said, wanted) for wanted in accepted or ("",))


def _mean(values: Any) -> float:
    listed = list(values)
    return sum(listed) / max(len(listed), 1)


def _share(hits: Any) -> float:
    return _mean(float(hit) for hit in hits)
