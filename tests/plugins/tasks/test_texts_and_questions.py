"""Reviews, emotions, news, SQuAD, LAMBADA: the hub's schema and the authors' give the same examples."""

from __future__ import annotations

import pytest
from datasets import ClassLabel, Features, Value

from vflair_core.errors import TaskError
from vflair_tasks import lambada, reviews, squad

TEXT = Value("string")


def classes(*names):
    return Features({"text": TEXT, "label": ClassLabel(names=list(names))})


def test_yelp_counts_its_classes_from_1_in_its_own_files_and_from_0_on_the_hub(hub, files):
    own = '"1","Bad ""place"", really."\n"5","Good, again."\n'
    there = files({"yelp_review_full_csv/train.csv": own, "yelp_review_full_csv/test.csv": own})
    rows = [{"text": 'Bad "place", really.', "label": 0}, {"text": "Good, again.", "label": 4}]
    stars = classes("1 star", "2 star", "3 stars", "4 stars", "5 stars")
    hub("train", rows, stars)
    for task in (
        reviews.yelp_full(data=str(there)),
        reviews.yelp_full(data=str(hub("test", rows, stars))),
    ):
        assert [(e.text, e.label) for e in task.train] == [
            ('Bad "place", really.', 0),
            ("Good, again.", 4),
        ]
        assert len(task.labels) == 5


def test_yelp_polarity_has_two_classes_and_refuses_a_third(files):
    there = files({"train.csv": '"1","Bad."\n"2","Good."\n', "test.csv": '"2","Good."\n"3","?"\n'})
    with pytest.raises(TaskError, match=r"split test, row 1.*'class': 3 is none of the 2 labels"):
        reviews.yelp_polarity(data=str(there))


def test_emotion_learns_from_train_only_and_not_from_the_file_that_holds_all(files):
    line = '{{"text": "i feel {}", "label": {}}}\n'
    there = files(
        {
            "data/data.jsonl": line.format("all", 0) * 9,
            "data/train.jsonl": line.format("fine", 1),
            "data/validation.jsonl": line.format("so so", 2),
            "data/test.jsonl": line.format("bad", 0),
        }
    )
    task = reviews.emotion(data=str(there))
    assert [(e.text, e.label) for e in task.train] == [("i feel fine", 1)]
    assert [(e.text, e.label) for e in task.test] == [("i feel bad", 0)]


def test_posts_lose_the_header_that_names_their_group(files):
    post = "From: ann@site.example\nNewsgroups: sci.med\nSubject: x\n\nIs it\n\nbad?\n"
    there = files(
        {
            "20news-bydate-train/sci.med/100": post,
            "20news-bydate-train/alt.atheism/7": post.replace("bad", "true"),
            "20news-bydate-test/sci.med/101": post,
        }
    )
    task = reviews.newsgroups(data=str(there))
    assert [(e.text, task.labels[e.label]) for e in task.train] == [
        ("Is it\n\ntrue?", "alt.atheism"),
        ("Is it\n\nbad?", "sci.med"),
    ]
    assert task.labels == tuple(sorted(task.labels))
    assert len(task.labels) == 20


SQUAD = {
    "version": "1.1",
    "data": [
        {
            "title": "Broncos",
            "paragraphs": [
                {
                    "context": "The Broncos beat the Panthers in Santa Clara.",
                    "qas": [
                        {
                            "id": "a1",
                            "question": "Who won?",
                            "answers": [
                                {"text": "Broncos", "answer_start": 4},
                                {"text": "The Broncos", "answer_start": 0},
                                {"text": "Broncos", "answer_start": 4},
                            ],
                        }
                    ],
                }
            ],
        }
    ],
}


def test_squad_marks_the_characters_of_the_answer_in_both_schemas(hub, files):
    there = files({"train-v1.1.json": SQUAD, "dev-v1.1.json": SQUAD})
    paragraph = SQUAD["data"][0]["paragraphs"][0]
    question = paragraph["qas"][0]
    given = {
        "text": [a["text"] for a in question["answers"]],
        "answer_start": [a["answer_start"] for a in question["answers"]],
    }
    row = {"id": "a1", "title": "B", "context": paragraph["context"], "question": "Who won?"}
    hub("train", [row | {"answers": given}], folder="plain_text")
    hubs = hub("validation", [row | {"answers": given}], folder="plain_text")
    for task in (squad.squad1(data=str(there)), squad.squad1(data=str(hubs))):
        (example,) = task.test
        start, end = example.span
        assert example.pair[start:end] == "Broncos"
        assert example.accepted == ("Broncos", "The Broncos")
        assert example.id == "a1"
        assert task.no_answer is False


def test_squad_2_has_questions_without_an_answer_and_1_has_not(files):
    paragraph = SQUAD["data"][0]["paragraphs"][0]
    none = {"id": "b", "question": "Why?", "answers": [], "is_impossible": True}
    both = {
        "data": [{"title": "", "paragraphs": [{**paragraph, "qas": [*paragraph["qas"], none]}]}]
    }
    there = files({"train-v2.0.json": both, "dev-v2.0.json": both})
    first, second = squad.squad2(data=str(there)).train
    assert first.span is not None
    assert (second.span, second.accepted) == (None, ("",))
    with pytest.raises(TaskError, match=r"row 1 \(b\) has no answer.*Take the task squad2"):
        list(squad.squad1(data=str(there)).train)


def test_an_answer_that_is_not_where_it_is_said_to_be_is_an_error():
    with pytest.raises(TaskError, match=r"'Broncos' does not stand at character 3.*' Bronco'"):
        squad.answer_span("The Broncos", "Broncos", 3, "squad, row 0")


def test_lambada_asks_for_the_last_word_of_a_passage_in_both_schemas(hub, files):
    passage = "he looked for signs , and found no signs"
    there = files(
        {
            "lambada_development_plain_text.txt": f"{passage}\n",
            "lambada_test_plain_text.txt": f"{passage}\nit was don't\n",
        }
    )
    hub("train", [{"text": "a novel " * 50, "domain": "x"}])
    hub("validation", [{"text": passage, "domain": "x"}])
    hubs = hub("test", [{"text": passage, "domain": "x"}, {"text": "it was don't", "domain": "x"}])
    for task in (lambada.lambada(data=str(there)), lambada.lambada(data=str(hubs))):
        assert [(e.text, e.answer) for e in task.train] == [
            ("he looked for signs , and found no", "signs")
        ]
        assert task.test[1].answer == "don't"


def test_a_file_in_another_layout_is_an_error_that_says_so(files):
    there = files({"train-v1.1.json": {"rows": []}, "dev-v1.1.json": SQUAD})
    with pytest.raises(
        TaskError, match=r"train-v1.1.json is not in the layout.*KeyError\('data'\)"
    ):
        squad.squad1(data=str(there))
