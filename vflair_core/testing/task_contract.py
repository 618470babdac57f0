"""What every task owes: `assert_task_contract` reads it, and lets a small model learn and answer it."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import random
from collections.abc import Callable
from typing import Any

import attrs
import torch

from vflair_core.parties.split import split
from vflair_core.partition.partition import Partition
from vflair_core.tasks.kinds import KINDS
from vflair_core.tasks.spans import rendered
from vflair_core.tasks.task import Example, Task, TaskCard
from vflair_core.tasks.tokenizer_training import train_tokenizer
from vflair_core.testing.models import tiny_model
from vflair_core.training.evaluation import evaluate, evaluate_party

SPLITS = ("train", "test")
VOCABULARY, LENGTH, LONG_TEXT = 300, 64, 20
MODELS = {
    "causal-lm": "gpt2",
    "classification": "bert",
    "regression": "bert",
    "question-answering": "bert",
    "seq2seq": "bart",
}


def assert_task_contract(
    make: Callable[..., Task],
    *,
    rows: int = 32,
    repeats: bool = False,
    tokenizer: Any = None,
    length: int = LENGTH,
    **options: Any,
) -> Task:
    """See that a task keeps the rules of docs/plugins.md; return it.

    Made twice it is the same, whatever global random numbers are drawn meanwhile. Its rows are what its kind needs; private
    spans lie in the text and stay with their words in the prompt; no test example is a training example, and public
    text holds none of either; right answers score 1. A small model learns from it and answers it, across the cut as
    in one piece, bit for bit. Its card tells what it is.

    Args:
        make: The function that a plugin offers.
        rows: How many of each split are looked at.
        repeats: Whether its source has rows of train in test, too.
        tokenizer: What prompts are written for, such as one with a chat template; left out, one trained on the task's texts.
        length: Tokens of a row that the small model reads.
        options: Given to it. Sizes of the card are compared without options only.

    Raises:
        AssertionError: It breaks a rule; it says which, and in what row.
        TaskError: A row lacks what its kind needs.
    """
    called = getattr(make, "__name__", str(make))
    task = _made(make, options, 1)
    _see_that_it_is_made_alike(task, _made(make, options, 2), rows, called)
    each = {part: _first(task, part, rows) for part in SPLITS}
    _see_that_nothing_overlaps(task, each, called, repeats=repeats)
    tokenizer = tokenizer if tokenizer is not None else _trained_tokenizer(task, each)
    _see_that_spans_hold(task, each, tokenizer, called)
    _see_that_right_answers_score(task, each["test"], called)
    _see_that_the_card_is_true(make, task, options, called)
    if task.kind in MODELS:  # pictures need a processor, which comes with a model
        _see_that_a_model_reads_it(task, each, tokenizer, length, called)
    return task


def _made(make: Callable[..., Task], options: dict[str, Any], seed: int) -> Task:
    was = random.getstate()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        random.seed(seed)
        try:
            task = make(**options)
        finally:
            random.setstate(was)
    if not isinstance(task, Task):
        raise AssertionError(f"{make} returned a {type(task).__name__}; it must return a Task.")  # noqa: TRY004 - as all rules
    return task


def _first(task: Task, part: str, rows: int) -> list[Example]:
    return [task.row(part, n) for n in range(min(rows, len(getattr(task, part))))]


def _see_that_it_is_made_alike(task: Task, again: Task, rows: int, called: str) -> None:
    for part in SPLITS:
        ours, theirs = getattr(task, part), getattr(again, part)
        same = len(ours) == len(theirs) and all(
            a.identity == b.identity and a.label == b.label and a.accepted == b.accepted
            for a, b in zip(_first(task, part, rows), _first(again, part, rows), strict=True)
        )
        if not same:
            raise AssertionError(
                f"{called} makes other {part} examples a second time: draw from `random.Random(seed)` of its own."
            )
    if list(task.public) != list(again.public):
        raise AssertionError(f"{called} has other public text a second time.")


def _see_that_nothing_overlaps(
    task: Task, each: dict[str, list[Example]], called: str, *, repeats: bool
) -> None:
    train = {example.identity for example in each["train"]}
    for example in each["test"]:
        if example.identity in train and not repeats:
            raise AssertionError(f"{called}: {example.title} is in train and in test.")
    public = _joined(" ".join(task.public))
    for part, example in ((name, e) for name in SPLITS for e in each[name]):
        for text in filter(None, (example.text, example.pair)):
            if len(text) >= LONG_TEXT and _joined(text) in public:
                raise AssertionError(
                    f"{called}: {example.title} ({part}) is in the public text, which attackers are given."
                )


def _joined(text: str) -> str:
    """A text with one space where there are several."""
    return " ".join(text.split())


def _see_that_spans_hold(
    task: Task, each: dict[str, list[Example]], tokenizer: Any, called: str
) -> None:
    for example in itertools.chain.from_iterable(each.values()):
        for spans, text in ((example.private, example.text), (example.private_pair, example.pair)):
            for start, end in spans or ():
                if end > len(text or ""):
                    raise AssertionError(
                        f"{called}: {example.title} is private at ({start}, {end}), and its text ends at {len(text or '')}."
                    )
        shown = rendered(example, task.render(example, tokenizer)) if task.render else example
        lost = [secret for secret in example.secrets if secret not in shown.secrets]
        if lost:
            raise AssertionError(
                f"{called}: {example.title} is private at {lost[0]!r}, and what the model reads is not: move the span along."
            )


def _see_that_right_answers_score(task: Task, rows: list[Example], called: str) -> None:
    if task.score is None or (task.kind == "causal-lm" and task.answering == "continue"):
        return
    if task.kind in ("classification", "regression") or task.answering == "choose":
        right: list[Any] = [example.label for example in rows]
    else:
        right = [example.accepted[0] if example.accepted else "" for example in rows]
    name, value = next(iter(task.score(right, rows).items()))
    if not math.isclose(value, 1.0, abs_tol=1e-6):
        raise AssertionError(f"{called}: right answers have a {name} of {value:.3g}, not of 1.")


def _see_that_the_card_is_true(
    make: Callable[..., Task], task: Task, options: dict[str, Any], called: str
) -> None:
    if not inspect.getdoc(make):
        raise AssertionError(
            f"{called} has no docstring: `vflair list tasks` has nothing to say of it."
        )
    card = getattr(make, "card", None)
    if card is None:
        return
    if not isinstance(card, TaskCard) or card.kind != task.kind:
        raise AssertionError(f"{called} has a card of another kind than {task.kind}: {card}.")
    sizes = {part: len(getattr(task, part)) for part in SPLITS}
    if not options and card.sizes and dict(card.sizes) != {k: sizes[k] for k in card.sizes}:
        raise AssertionError(f"{called} has {sizes} rows, and its card says {dict(card.sizes)}.")


def _trained_tokenizer(task: Task, each: dict[str, list[Example]]) -> Any:
    texts = [text for rows in each.values() for e in rows for text in (e.text, e.pair or "")]
    return train_tokenizer([*task.public, *texts], VOCABULARY, pairs=KINDS[task.kind].pairs)


def _see_that_a_model_reads_it(
    task: Task, each: dict[str, list[Example]], tokenizer: Any, length: int, called: str
) -> None:
    """Loss and metrics across the cut are those of the model in one piece."""
    small = attrs.evolve(task, train=each["train"][:4], test=each["test"][:4])
    kind = MODELS[task.kind]
    sizes: dict[str, Any] = {"vocab_size": len(tokenizer), "max_position_embeddings": 2 * length}
    if KINDS[task.kind].labelled:
        sizes["num_labels"] = max(len(task.labels), 1)
    if kind == "bart":
        sizes |= {"d_model": 16, "encoder_layers": 3, "decoder_layers": 3, "encoder_ffn_dim": 32}
        sizes |= {"decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    whole = tiny_model(kind, task.kind, **sizes)
    party, _ = split(copy.deepcopy(whole), Partition(1, 1), tokenizer=tokenizer)
    party.model.eval()
    party.take_up(small)
    batch = party.encode(small.train, max_length=length)
    theirs, ours = (model(**batch).loss for model in (whole, party.model))
    if not bool(torch.isfinite(theirs)):
        raise AssertionError(f"{called}: the loss of its first training rows is {float(theirs)}.")
    if not torch.equal(ours, theirs):
        raise AssertionError(f"{called}: its loss across the cut is not that of the whole model.")
    found = evaluate_party(party, small, batch_size=2, max_length=length)
    expected = evaluate(whole, small, party.preprocessor(length), batch_size=2)
    if not _equal(found.metrics, expected.metrics):
        raise AssertionError(
            f"{called}: {found.metrics} across the cut, and {expected.metrics} of the whole model."
        )
    main = next(iter(found.metrics.values()))
    if not (
        math.isnan(main) or 0.0 <= main <= 1.0
    ):  # one is, of a model that says the same of all rows
        raise AssertionError(f"{called}: its main-task performance is {main}, not in [0, 1].")


def _equal(ours: dict[str, float], theirs: dict[str, float]) -> bool:
    """Whether metrics are the same, what is not a number included."""
    return ours.keys() == theirs.keys() and all(
        value == theirs[name] or (math.isnan(value) and math.isnan(theirs[name]))
        for name, value in ours.items()
    )
