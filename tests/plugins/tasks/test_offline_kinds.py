"""An offline task of each kind: reproducible, disjoint, and with the right answer marked."""

from __future__ import annotations

import json
import re

import pytest

from vflair_core.errors import TaskError
from vflair_tasks.offline import manual_similarity
from vflair_tasks.offline_questions import (
    COLOURS,
    draw,
    record_answers,
    record_choices,
    record_drawings,
    record_questions,
    record_summaries,
)

KINDS = {
    manual_similarity: "regression",
    record_questions: "question-answering",
    record_answers: "causal-lm",
    record_choices: "causal-lm",
    record_summaries: "seq2seq",
    record_drawings: "image-text",
}
SMALL = {"train_examples": 60, "test_examples": 20, "public_characters": 50_000}
EMAIL = re.compile(r"[\w.-]+@[\w-]+(?:\.[\w-]+)*\w")
NUMBER = {"phone": re.compile(r"\d{3} \d{3} \d{3}"), "account": re.compile(r"\d{4}-\d{5}")}


@pytest.fixture(scope="module", params=KINDS, ids=lambda make: make.__name__)
def make(request):
    return request.param


def contents(task):
    return [
        (e.text, e.pair, e.label, e.accepted, e.choices, [i.tobytes() for i in e.images])
        for e in [*task.train, *task.test]
    ]


def words_in_13(text):
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[n : n + 13]) for n in range(len(words) - 12)}


def test_equal_seeds_give_equal_examples_pictures_too_and_other_seeds_others(make):
    first, again, other = (make(seed=seed, **SMALL) for seed in (0, 0, 1))
    assert contents(first) == contents(again)
    assert contents(first) != contents(other)
    assert first.facts["corpus_sha256"] == again.facts["corpus_sha256"]
    assert first.facts["corpus_sha256"] != other.facts["corpus_sha256"]
    assert (len(first.train), len(first.test)) == (60, 20)
    assert first.kind == KINDS[make] == make.card.kind
    json.dumps(first.facts)


def test_default_sizes_are_those_on_the_card(make):
    task = make(public_characters=0)
    assert make.card.sizes == {"train": len(task.train), "test": len(task.test)}


def test_no_text_is_in_both_splits_and_none_shares_13_words_with_public_text(make):
    task = make(**SMALL)
    texts = [{t for e in split for t in (e.text, e.pair) if t} for split in (task.train, task.test)]
    assert not texts[0] & texts[1]
    private = set().union(*(words_in_13(text) for text in texts[0] | texts[1]))
    assert not [text for text in task.public if private & words_in_13(text)]
    assert len(task.public) > 50


def test_questions_are_answered_by_a_span_or_by_nothing_as_often_as_asked():
    task = record_questions(**SMALL | {"train_examples": 1000}, unanswerable=0.4)
    without = 0
    for example in task.train:
        secrets = [example.pair[slice(*span)] for span in example.private_pair]
        assert example.text[slice(*example.private[0])] in secrets
        if example.span is None:
            without += 1
            asked = "phone" if "phone" in example.text else "account"
            assert not NUMBER[asked].search(example.pair)
            assert example.accepted == ("",)
        else:
            answer = example.pair[slice(*example.span)]
            kind = next((k for k in NUMBER if k in example.text), None)
            found = NUMBER[kind].search(example.pair) if kind else EMAIL.search(example.pair)
            assert answer == example.answer == found[0]
    # Binomial(1000, 0.4) has standard deviation 15.5: five of them miss once in two million seeds.
    assert abs(without - 400) < 5 * 15.5
    assert record_questions(**SMALL, unanswerable=0).no_answer is False
    assert task.no_answer is True


def test_answers_are_in_the_record_and_the_template_is_not_private(tokenizer):
    task = record_answers(**SMALL)
    for example in task.train:
        assert example.answer in example.secrets
        shown = task.render(example, tokenizer)
        assert shown.text == f"Note: {example.pair}\nQuestion: {example.text}\nAnswer:"
        assert sorted(shown.secrets) == sorted(example.secrets)


def test_one_of_four_choices_is_the_address_and_the_others_differ_by_a_letter():
    task = record_choices(**SMALL)
    places = set()
    for example in task.train:
        right = example.choices[example.label]
        assert right == EMAIL.search(example.pair)[0]
        for choice in example.choices:
            assert len(choice) == len(right)
            differing = sum(a != b for a, b in zip(choice, right, strict=True))
            assert differing == (0 if choice == right else 1)
        assert len(set(example.choices)) == 4
        places.add(example.label)
    assert places == {0, 1, 2, 3}


def test_summaries_are_the_planted_strings():
    for example in record_summaries(**SMALL).train:
        assert sorted(example.answer.split(", ")) == sorted(example.secrets)


def test_similarity_is_five_times_the_share_of_words_that_are_left():
    labels = []
    for example in manual_similarity(**SMALL).train:
        words, mixed = example.text.split(), example.pair.split()
        left = [a for a, b in zip(words, mixed, strict=True) if a == b]
        assert example.label == pytest.approx(5 * len(left) / len(words))
        labels.append(example.label)
    assert min(labels) < 1
    assert max(labels) > 4


def test_a_drawing_shows_the_shape_and_colour_of_its_answer():
    for example in record_drawings(**SMALL, pixels=40).train:
        _, colour, shape = example.answer.split()
        (picture,) = example.images
        assert picture.size == (40, 40)
        inked = [
            (x, y) for x in range(40) for y in range(40)
            if picture.getpixel((x, y)) == COLOURS[colour]
        ]  # fmt: skip
        assert {picture.getpixel((x, y)) for x in range(40) for y in range(40)} == {
            COLOURS[colour],
            (255, 255, 255),
        }
        wide = max(x for x, _ in inked) - min(x for x, _ in inked) + 1
        high = max(y for _, y in inked) - min(y for _, y in inked) + 1
        share = len(inked) / (
            wide * high
        )  # of its box: 1 of a square, π/4 of a circle, 1/2 of a triangle
        if shape == "bar":
            assert high < wide / 2
        else:
            assert abs(wide - high) <= 1
            expected = {"square": 1, "circle": 0.785, "triangle": 0.5}[shape]
            assert share == pytest.approx(expected, abs=0.06)
        assert example.secrets[0] in example.text


def test_shapes_differ():
    pictures = {s: draw(s, "red", pixels=32, corner=(0, 0)).tobytes() for s in ("circle", "square")}
    assert pictures["circle"] != pictures["square"]


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (record_answers, {"train_examples": 0}, "train_examples=0 leaves a split empty"),
        (record_summaries, {"train_examples": 9000}, "Cannot plant 9200 records"),
        (record_questions, {"unanswerable": 1.0}, "unanswerable=1.0 is not a share.*try 0.25"),
        (record_drawings, {"pixels": 4}, "pixels=4 is too small"),
        (manual_similarity, {"test_examples": 5000}, "Cannot make 5300 pairs.*a pair takes two"),
    ],
)
def test_an_impossible_option_is_an_error(make, options, words):
    with pytest.raises(TaskError, match=words):
        make(**options)


def test_an_option_that_does_not_exist_is_an_error():
    with pytest.raises(TypeError, match="record-answers has no option 'shotts'; it has public_"):
        record_answers(shotts=1)


@pytest.mark.parametrize("pixels", [8, 30, 32])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_picture_is_in_both_splits(seed, pixels):
    sizes = {"train_examples": 400, "test_examples": 100, "public_characters": 50_000}
    task = record_drawings(seed=seed, pixels=pixels, **sizes)
    splits = [{e.images[0].tobytes() for e in split} for split in (task.train, task.test)]
    assert not splits[0] & splits[1]
