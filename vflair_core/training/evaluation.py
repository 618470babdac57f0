"""Main-task performance (MP), the same way for a split and an unsplit model: predict, then score."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from attrs import define, field, frozen

from vflair_core.parties.data_party.party import DataParty
from vflair_core.tasks.collation import IGNORED, loss_items
from vflair_core.tasks.continuation import answer_text, end_tokens
from vflair_core.tasks.metrics import chance_of, standard_score
from vflair_core.tasks.preprocessor import Preprocessor
from vflair_core.tasks.question_answering import best_answers
from vflair_core.tasks.task import Example, Task

Run = Callable[..., Any]  # a model, whole or split, called with a batch
GREEDY: Mapping[str, Any] = {"do_sample": False, "num_beams": 1, "max_new_tokens": 32}


@frozen
class Evaluation:
    """What an evaluation found.

    Attributes:
        metrics: By name; the first is MP, in [0, 1], higher is better.
        chance: The MP of the best prediction that is the same for every example.
    """

    metrics: dict[str, float]
    chance: float


def evaluate(model: Any, task: Task, reader: Preprocessor, *, batch_size: int) -> Evaluation:
    """Score `model` on the test examples as `reader` reads them, in eval mode; the mode is put back.

    Every kind gets the mean loss in nats. First stands, by kind:

    - ``classification``: accuracy;
    - ``regression``: R² clipped to [0, 1], then the mean squared error;
    - ``question-answering``: exact match and token F1 of the best span, no answer being one;
    - language models by what the task asks: accuracy of the most likely choice (and of the most likely per token),
      exact match and token F1 of a generated answer, or next-token accuracy. All add the perplexity of what was
      to be said.

    A task's own `score` replaces what stands first; its metrics go before these.
    """
    found, training = _Found(), model.training
    model.eval()
    try:
        with torch.no_grad():
            for start in range(0, len(task.test), batch_size):
                numbers = range(start, min(start + batch_size, len(task.test)))
                _predict(model, task, reader, [task.row("test", n) for n in numbers], found)
    finally:
        model.train(training)
    if task.score is None:
        metrics = standard_score(task, found.predictions, found.truth)
    else:
        metrics = dict(task.score(found.predictions, task.test))
    if task.kind in ("causal-lm", "seq2seq", "image-text"):
        found.extra["perplexity"] = math.exp(min(found.mean_loss, 700.0))
    extra = found.extra | {"loss": found.mean_loss}
    metrics |= {name: value for name, value in extra.items() if name not in metrics}
    return Evaluation(metrics, chance_of(task, found.truth))


def evaluate_party(party: DataParty, task: Task, *, batch_size: int, max_length: int) -> Evaluation:
    """Evaluate across the cut, with the defenses on."""
    with party.answering():
        reader = party.preprocessor(max_length)
        return evaluate(party.model, task, reader, batch_size=batch_size)


@define
class _Found:
    """What is gathered from batch to batch."""

    predictions: list[Any] = field(factory=list)
    truth: list[Any] = field(
        factory=list
    )  # labels; for language models without answers (T,) tokens
    losses: list[tuple[float, int]] = field(factory=list)
    extra: dict[str, float] = field(factory=dict)
    right_per_token: int = 0

    @property
    def mean_loss(self) -> float:
        return sum(loss * n for loss, n in self.losses) / max(sum(n for _, n in self.losses), 1)


def _predict(
    model: Any, task: Task, reader: Preprocessor, examples: Sequence[Example], found: _Found
) -> None:
    encoded = reader.batch(examples)
    batch = encoded.batch
    outputs = model(**batch, use_cache=False)
    items = loss_items(batch, shifted=not reader.reading.two_stacks)
    found.losses.append((float(outputs.loss), items))
    if task.kind == "classification":
        found.predictions += outputs.logits.argmax(-1).tolist()
        found.truth += batch["labels"].tolist()
    elif task.kind == "regression":
        found.predictions += outputs.logits.squeeze(-1).tolist()
        found.truth += batch["labels"].tolist()
    elif task.kind == "question-answering":
        scores = (outputs.start_logits, outputs.end_logits)
        passages = [example.pair for example in examples]
        answers = best_answers(encoded.rows, *scores, or_none=task.no_answer, passages=passages)
        found.predictions += _passed_back(reader, examples, answers)
        found.truth += [example.accepted for example in examples]
    elif task.answering == "choose":
        _choose(model, reader, examples, found)
    elif task.answering == "write":
        found.predictions += _write(model, task, reader, examples)
        found.truth += [example.accepted for example in examples]
    else:
        found.predictions += list(outputs.logits.argmax(-1))
        found.truth += list(batch["labels"])


def _choose(model: Any, reader: Preprocessor, examples: Sequence[Example], found: _Found) -> None:
    """Predict the choice whose tokens are most likely after the prompt, in sum; count also by token."""
    encoded = reader.choices(examples)
    batch = encoded.batch
    logits, labels = model(**batch, use_cache=False).logits, batch["labels"]
    if not reader.reading.two_stacks:
        logits, labels = logits[:, :-1], labels[:, 1:]
    spoken = labels != IGNORED
    likely = logits.log_softmax(-1).gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    sums = (likely * spoken).sum(-1)
    means = sums / spoken.sum(-1).clamp_min(1)
    sizes = [len(example.choices) for example in examples]
    for example, total, mean in zip(examples, sums.split(sizes), means.split(sizes), strict=True):
        found.predictions.append(int(total.argmax()))
        found.right_per_token += int(mean.argmax()) == example.label
        found.truth.append((example.label, len(example.choices)))
    found.extra["accuracy_per_token"] = found.right_per_token / len(found.truth)


def _write(model: Any, task: Task, reader: Preprocessor, examples: Sequence[Example]) -> list[str]:
    """Generate an answer to each example, cut at the end token, without special tokens."""
    encoded, tokenizer = reader.prompts(examples), reader.tokenizer
    batch, ends = encoded.batch, [end_tokens(tokenizer, row.example) for row in encoded.rows]
    options = {**GREEDY, "pad_token_id": tokenizer.pad_token_id, **task.generation}
    own = model.generation_config.eos_token_id
    stops = set(own if isinstance(own, list) else [own]) - {None} | set.union(*ends)
    if any(row.example.chat for row in encoded.rows):  # elsewhere the model's own tokens stop it
        options.setdefault("eos_token_id", sorted(stops))
    with torch.random.fork_rng():
        torch.manual_seed(0)  # a task that samples is sampled alike, split or not
        ids = model.generate(**batch, **options)
    new = ids if reader.reading.two_stacks else ids[:, batch["input_ids"].shape[1] :]
    texts = [
        answer_text(tokenizer, row.example, list(_until(tokens, stops)))
        for row, tokens in zip(encoded.rows, new.tolist(), strict=True)
    ]
    return _passed_back(reader, examples, texts)


def _until(row: Sequence[int], ends: set[int]) -> Iterator[int]:
    for token in row:
        if token in ends:
            return
        yield token


def _passed_back(
    reader: Preprocessor, examples: Sequence[Example], texts: Sequence[str]
) -> list[str]:
    """Defenses that changed a prompt may undo the change in the answer."""
    if reader.defenses is None:
        return list(texts)
    pairs = zip(examples, texts, strict=True)
    return [reader.defenses.answer(example.text, text) for example, text in pairs]
