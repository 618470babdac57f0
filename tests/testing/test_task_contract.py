"""`assert_task_contract` passes what keeps the rules, and names the rule that is broken."""

from __future__ import annotations

import random

import attrs
import pytest

from support import task_kinds
from vflair_core import Example, Task, TaskCard, TaskError, in_chat, train_tokenizer
from vflair_core.testing import assert_task_contract

WORDS = "river stone lamp paper cloud engine winter garden copper signal".split()  # noqa: SIM905


def drawn(seed=0):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=8)) for _ in range(60)]


def whose(*, examples: int = 12) -> Task:
    """Say whose it is."""
    rows = [
        Example(
            f"It belongs to person {n}.", private=((11, 19 + len(str(n))),), answer=f"person {n}"
        )
        for n in range(examples)
    ]

    def ask(example, tokenizer):
        return Example(f"Read: {example.text} Whose?", answer=example.answer)

    return Task("whose", "causal-lm", rows[4:], rows[:4], public=drawn(), render=ask)


whose.card = TaskCard(kind="causal-lm", metric="exact_match", sizes={"train": 8, "test": 4})


def test_a_task_that_keeps_the_rules_passes_and_comes_back():
    task = assert_task_contract(whose)
    assert task.name == "whose"
    assert_task_contract(whose, examples=6)  # the card is of the defaults


@pytest.mark.parametrize(
    "make",
    [
        task_kinds.pairs,
        task_kinds.lengths,
        task_kinds.passages,
        task_kinds.colours,
        task_kinds.choices,
        task_kinds.sentences,
        task_kinds.reversed_,
    ],
    ids=lambda make: make.__name__,
)
def test_tasks_of_each_kind_pass(make):
    assert_task_contract(make, repeats=True)


def changed(**fields):
    """The task with other fields, as a function that makes it."""

    def make() -> Task:
        """Say whose it is."""
        given = {name: value() if callable(value) else value for name, value in fields.items()}
        return attrs.evolve(whose(), **given)

    return make


def unrendered(example, tokenizer):
    return Example(f"Read: {example.text}", private=example.private, answer=example.answer)


def only_a_pair(example, tokenizer):
    return Example("Read that.", answer=example.answer)


def in_two_spaces():
    return [e.text.replace(" ", "  ") for e in whose().test]


def half(predictions, examples):
    return {"half": 0.5}


def without_text():
    return whose()


def with_a_false_card():
    """Say whose it is."""
    return whose()


with_a_false_card.card = TaskCard(kind="causal-lm", sizes={"train": 800})


def with_a_card_of_another_kind():
    """Say whose it is."""
    return whose()


with_a_card_of_another_kind.card = TaskCard(kind="seq2seq")


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (
            changed(train=lambda: [Example(drawn(None)[0], answer="a")]),
            "makes other train examples",
        ),
        (changed(public=lambda: drawn(None)), "other public text a second time"),
        (changed(test=lambda: whose().train[:2]), "is in train and in test"),
        (changed(public=lambda: [e.text for e in whose().test]), "is in the public text"),
        (changed(public=in_two_spaces), "is in the public text"),
        (changed(render=lambda: only_a_pair), "what the model reads is not: move the span along"),
        (changed(render=lambda: unrendered), "what the model reads is not: move the span along"),
        (changed(test=[Example("short", private=((0, 9),), answer="a")]), "its text ends at 5"),
        (changed(score=lambda: half), "right answers have a half of 0.5"),
        (without_text, "has no docstring"),
        (with_a_false_card, "and its card says {'train': 800}"),
        (with_a_card_of_another_kind, "has a card of another kind than causal-lm"),
        (lambda: "a task", "returned a str"),
    ],
)
def test_each_broken_rule_is_named(make, rule):
    with pytest.raises(AssertionError, match=rule):
        assert_task_contract(make)


def test_a_score_that_is_no_number_where_all_predictions_are_alike_passes():
    def share(predictions, examples):
        alike = len(set(predictions)) == 1
        return {"share": float("nan") if alike else 1.0}

    assert_task_contract(changed(score=lambda: share))


def test_a_chat_is_written_for_the_tokenizer_that_is_given():
    tokenizer = train_tokenizer(drawn(), 300)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )

    def asked(example, tokenizer):
        return in_chat(example, [{"role": "user", "content": example.text}], tokenizer)

    assert_task_contract(changed(render=lambda: asked), tokenizer=tokenizer, length=96)


def test_rows_that_lack_something_are_refused_by_the_task_itself():
    class Rows:
        def __len__(self):
            return 2

        def __getitem__(self, number):
            return Example("text", label=7)

    def lazy() -> Task:
        """Rows that are made when they are asked for."""
        return Task("lazy", "classification", Rows(), Rows(), labels=("a", "b"))

    with pytest.raises(TaskError, match=r"train row 0: label 7"):
        assert_task_contract(lazy)
