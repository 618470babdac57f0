"""Main-task performance (MP) across the cut, and the defense score DCS of VFLAIR-LLM."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from vflair_core.data_party import DataParty
from vflair_core.defense import Batch
from vflair_core.encoding import IGNORED
from vflair_core.task import Example, Task

Run = Callable[..., Any]  # a model, whole or split, called with a batch


def evaluate(
    model: Run, task: Task, make_batch: Callable[[Sequence[Example]], Batch], *, batch_size: int
) -> dict[str, float]:
    """Score `model` on the test examples, made into batches by `make_batch`. The first metric is MP, in [0, 1], higher is better.

    For ``causal-lm``: next-token accuracy and loss (nats per token); for ``classification``: accuracy and
    loss; for ``regression``: R² clipped to [0, 1], and mean squared error. A task's own `score` goes first.
    """
    logits, losses, predictions, labels = [], [], [], []
    with torch.no_grad():
        for examples in _chunks(task.test, batch_size):
            batch = make_batch(examples)
            outputs = model(**batch, use_cache=False)
            losses.append((float(outputs.loss), _weight(batch["labels"])))
            logits.append(outputs.logits)
            labels.append(batch["labels"])
            predictions += _predict(task, outputs.logits)
    loss = sum(value * weight for value, weight in losses) / sum(weight for _, weight in losses)
    metrics = _own(task, logits, labels) | {"loss": loss}
    if task.score is None:
        return metrics
    own = dict(task.score(predictions, task.test))
    return own | {name: value for name, value in metrics.items() if name not in own}


def evaluate_party(
    party: DataParty, task: Task, *, batch_size: int, max_length: int
) -> dict[str, float]:
    """Evaluate across the cut, defenses on, in eval mode; the mode is put back."""
    training = party.model.training
    party.model.eval()
    make_batch = functools.partial(party.encode, max_length=max_length)
    try:
        return evaluate(party.model, task, make_batch, batch_size=batch_size)
    finally:
        party.model.train(training)


def _chunks(examples: Sequence[Example], size: int) -> Iterable[Sequence[Example]]:
    for start in range(0, len(examples), size):
        yield [examples[n] for n in range(start, min(start + size, len(examples)))]


def _weight(labels: Tensor) -> int:
    return int((labels[:, 1:] != IGNORED).sum()) if labels.dim() == 2 else len(labels)


def _predict(task: Task, logits: Tensor) -> list[Any]:
    if task.kind == "classification":
        return logits.argmax(-1).tolist()  # type: ignore[no-any-return]
    return logits.squeeze(-1).tolist() if task.kind == "regression" else list(logits.argmax(-1))


def _own(task: Task, logits: list[Tensor], labels: list[Tensor]) -> dict[str, float]:
    if task.kind == "causal-lm":
        right = total = 0
        for scores, truth in zip(logits, labels, strict=True):
            wanted = truth[:, 1:]
            right += int(((scores[:, :-1].argmax(-1) == wanted) & (wanted != IGNORED)).sum())
            total += int((wanted != IGNORED).sum())
        return {"token_accuracy": right / total}
    scores, truth = torch.cat(logits), torch.cat(labels)
    if task.kind == "classification":
        return {"accuracy": float((scores.argmax(-1) == truth).float().mean())}
    error = float((scores.squeeze(-1) - truth).square().mean())
    variance = float(truth.var(correction=0))
    return {"r2": max(0.0, 1 - error / variance) if variance else 0.0, "mean_squared_error": error}


def dcs(attack: float, main: float, undefended_main: float, *, beta: float = 0.5) -> float:
    """Defense capability score of VFLAIR-LLM (arXiv 2508.03097), with AP* = 0 and MP* = `undefended_main`.

    In [0.5, 1], higher is better. Not comparable between tasks: where MP* is low, lost utility costs little.
    """
    privacy, utility = max(attack, 0.0), max(undefended_main - main, 0.0)
    return 1 / (1 + math.sqrt((1 - beta) * privacy**2 + beta * utility**2))


def normalised_dcs(
    attack: float, floor: float, undefended_attack: float,
    main: float, chance: float, undefended_main: float,
) -> float:  # fmt: skip
    """DCS on scales where 0 is chance and 1 is undefended, so that tasks can be compared."""
    span = undefended_attack - floor
    leaked = min(max((attack - floor) / span, 0.0), 1.0) if span > 0 else 0.0
    reach = undefended_main - chance
    kept = min(max((main - chance) / reach, 0.0), 1.0) if reach > 0 else 1.0
    return dcs(leaked, kept, 1.0)
