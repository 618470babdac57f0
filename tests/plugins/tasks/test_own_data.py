"""A user's own data: three lines of TOML, any file, and an error that names row and column."""

from __future__ import annotations

import datasets
import pytest
from PIL import Image as Pictures

from vflair_core import plugin_manager
from vflair_core.errors import TaskError
from vflair_core.experiments.config import experiment_from
from vflair_core.offers import build, find
from vflair_tasks import own as own_module
from vflair_tasks.own import own
from vflair_tasks.tables import Opened

REVIEWS = [{"review": f"text {n}", "stars": n % 3 + 3} for n in range(60)]
CSV = "review,stars\n" + "".join(f"{row['review']},{row['stars']}\n" for row in REVIEWS)


def write(path, ending):
    path = path / f"my.{ending}"
    if ending == "parquet":
        datasets.Dataset.from_list(REVIEWS).to_parquet(path)
    elif ending == "jsonl":
        path.write_text(
            "".join(f'{{"review": "text {n}", "stars": {n % 3 + 3}}}\n' for n in range(60))
        )
    else:
        path.write_text(CSV if ending == "csv" else CSV.replace(",", "\t"))
    return str(path)


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_three_lines_of_toml_make_a_task_of_any_file(ending, tmp_path, monkeypatch):
    import tomllib

    write(tmp_path, ending)
    monkeypatch.chdir(tmp_path)
    text = f"""
    [task]
    name = "own"
    options = {{ data = "my.{ending}", kind = "classification", text = "review", label = "stars" }}
    """
    experiment = experiment_from(tomllib.loads(text) | {"model": {"name": "m"}})
    manager = plugin_manager()
    if not find_own(manager):
        import vflair_tasks

        manager.register(vflair_tasks)
    task = build(find(manager, "tasks", "own"), experiment.task.options)
    assert task.labels == ("3", "4", "5")
    rows = [(e.text, task.labels[e.label]) for e in [*task.train, *task.test]]
    assert sorted(rows) == sorted((row["review"], str(row["stars"])) for row in REVIEWS)


def find_own(manager):
    from vflair_core.offers import offers

    return "own" in offers(manager, "tasks")


def test_a_folder_gives_the_splits_it_has(files):
    there = files({"train.csv": CSV, "test.csv": "review,stars\nnew,3\n"})
    task = own(data=str(there), kind="classification", text="review", label="stars")
    assert (len(task.train), len(task.test)) == (60, 1)


def test_equal_texts_are_on_one_side_and_all_rows_on_some(files):
    there = files({"my.csv": CSV + CSV[len("review,stars\n") :]})
    task = own(
        data=str(there / "my.csv"),
        kind="classification",
        text="review",
        label="stars",
        test_share=0.3,
    )
    train, test = ([e.text for e in split] for split in (task.train, task.test))
    assert not set(train) & set(test)
    assert sorted(train + test) == sorted(row["review"] for row in REVIEWS * 2)
    again = own(
        data=str(there / "my.csv"), kind="classification", text="review", label="stars",
        test_share=0.3, seed=1,
    )  # fmt: skip
    assert {e.text for e in again.test} != set(test)


def test_rows_lie_in_a_mapped_file_of_the_cache(files, own_cache):
    there = files({"my.csv": CSV})
    task = own(data=str(there / "my.csv"), kind="classification", text="review", label="stars")
    (mapped,) = task.train.table.cache_files
    assert mapped["filename"].startswith(str(own_cache))
    assert task.test.table is task.train.table


def test_the_share_of_the_test_is_the_one_asked_for(files):
    there = files({"my.csv": "t,y\n" + "".join(f"row {n},{n % 2}\n" for n in range(5000))})
    task = own(
        data=str(there / "my.csv"), kind="classification", text="t", label="y", test_share=0.2
    )
    # Binomial(5000, 0.2) has standard deviation 28: five of them miss once in two million seeds.
    assert abs(len(task.test) - 1000) < 5 * 28.3


CASES = {
    "regression": ("t,y\na,1.5\nb,-2\nc,3\n", {"label": "y"}, [1.5, -2.0, 3.0]),
    "causal-lm": ("t\na\nb\nc\n", {}, [None, None, None]),
    "seq2seq": ("t,y\na,A\nb,B\nc,C\n", {"answer": "y"}, [None, None, None]),
}


@pytest.mark.parametrize("kind", CASES)
def test_every_kind_reads_its_columns(kind, files):
    text, options, labels = CASES[kind]
    there = files({"train.csv": text, "test.csv": text})
    task = own(data=str(there), kind=kind, text="t", **options)
    assert [e.label for e in task.train] == labels
    assert [e.answer for e in task.train] == (
        ["A", "B", "C"] if kind == "seq2seq" else [None, None, None]
    )


def test_a_question_finds_its_answer_in_the_passage_and_may_have_none(files):
    there = files({"train.csv": "q,p,a\nWho?,I am Ada.,Ada\nWhy?,I am Ada.,\n"})
    options = {"kind": "question-answering", "text": "q", "pair": "p", "answer": "a"}
    files({"test.csv": "q,p,a\nWho?,I am Ada.,Ada\n"})
    first, second = own(data=str(there), **options).train
    assert first.pair[slice(*first.span)] == "Ada"
    assert (second.span, second.accepted) == (None, ("",))
    files({"train.csv": "q,p,a\nWho?,I am Ada.,Ada\nWho?,I am Ada.,Eve\n"})
    with pytest.raises(TaskError, match=r"row 1 .*column 'a': the answer 'Eve' does not stand"):
        own(data=str(there), **options)


def test_choices_are_a_column_of_lists(files):
    line = '{"q": "Which?", "c": ["red", "blue"], "y": %d}\n'
    there = files({"train.jsonl": line % 1, "test.jsonl": line % 0})
    options = {"kind": "causal-lm", "text": "q", "choices": "c", "label": "y"}
    (example,) = own(data=str(there), **options).train
    assert example.choices[example.label] == "blue"
    files({"test.jsonl": line % 2})
    with pytest.raises(TaskError, match=r"test, row 0.*column 'y': 2 is no index into 2 choices"):
        own(data=str(there), **options)


def test_pictures_are_paths_from_the_folder_of_the_file(files):
    line = "q,i,a\nWhat?,pics/0.png,red\n"
    there = files({"train.csv": line, "test.csv": line})
    (there / "pics").mkdir()
    Pictures.new("RGB", (4, 4), (255, 0, 0)).save(there / "pics" / "0.png")
    task = own(data=str(there), kind="image-text", text="q", image="i", answer="a")
    assert task.train[0].images[0].getpixel((0, 0)) == (255, 0, 0)
    (there / "pics" / "0.png").unlink()
    with pytest.raises(TaskError, match=r"row 0 .*column 'i'.*0.png.* does not exist"):
        own(data=str(there), kind="image-text", text="q", image="i", answer="a")


def test_only_the_columns_named_are_private_and_the_template_never_is(files, tokenizer):
    text = "q,p,y\nWho?,I am Ada.,x\n"
    there = files({"train.csv": text, "test.csv": text})
    task = own(
        data=str(there), kind="causal-lm", text="q", pair="p", answer="y", private=["p"],
        prompt="Context: {p}\nQuestion: {q}\n",
    )  # fmt: skip
    assert task.train[0].secrets == ()  # the whole pair is private, nothing of the text
    shown = task.render(task.train[0], tokenizer)
    assert shown.text == "Context: I am Ada.\nQuestion: Who?\n"
    assert shown.secrets == ("I am Ada.",)
    with pytest.raises(TaskError, match=r"private names the column 'y'. Possible: q, p"):
        own(data=str(there), kind="causal-lm", text="q", pair="p", private=["y"])


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("reveiw,stars\na,1\n", {}, r"no column 'review'.*Did you mean 'reveiw'.*reveiw, stars"),
        ("", {}, r"my.csv is empty"),
        ("review,stars\n", {}, r"my.csv has no rows"),
        ("review,stars\na,1\n,2\n", {}, r"row 1 \(the first is 0\), column 'review' is empty"),
        ("review,stars\na,1\nb,\nc,\n", {}, r"row 1 .*column 'stars' is empty, and 1 more cells"),
        ("review,stars\na,1\nb,3\n", {"labels": ["1", "2"]}, r"row 1.*'stars': 3 is none of the 2"),
        ("review,stars\na,1\nb,1\n", {}, r"'stars' has 1 distinct values; classes are 2 to 1000"),
        ("review,stars\na,1.5\nb,2\n", {}, r"fractions such as 1.5.*kind = \"regression\""),
        ("review,stars\na,1\nb,x\n", {"kind": "regression"}, r"row 1.*'stars': 'x' is not a number"),
        ("review,stars\na,1\nb,2\n", {"kind": "clasification"}, r"Did you mean 'classification'"),
        ("review,stars\na,1\nb,2\n", {"label": ""}, r"needs the column of its label: add label"),
        ("review,stars\na,1\nb,2\n", {"empty": "skip"}, r"empty='skip' is unknown. Possible: error, drop"),
        ("review,stars\na,1\nb,2\n", {"test_share": 1.0}, r"test_share=1.0 leaves a split empty"),
        ("review,stars\na,1\nb,2,3\n", {}, r"does not parse as csv.*nothing of it was kept"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_an_error_that_names_row_and_column(text, options, words, files):
    there = files({"my.csv": text}) / "my.csv"
    given = {"kind": "classification", "text": "review", "label": "stars"} | options
    with pytest.raises(TaskError, match=words):
        own(data=str(there), **given)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "classification", "label": "y", "answer": "t"}, "has no use for answer = 't'"),
        ({"kind": "causal-lm", "label": "y"}, "has no use for label = 'y'"),
        ({"kind": "regression", "label": "y", "labels": ["a"]}, "labels name classes"),
        ({"kind": "classification", "label": "y", "choices": "t"}, "has no choices"),
        ({"kind": "causal-lm", "test_split": "dev"}, "is one file and has neither splits"),
        ({"kind": "causal-lm", "system": "Be brief."}, "Set chat = true"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(options, words, files):
    there = files({"my.csv": "t,y\n" + "".join(f"text {n},{n % 2}\n" for n in range(50))})
    with pytest.raises(TaskError, match=words):
        own(data=str(there / "my.csv"), text="t", **options)


def test_a_share_is_refused_where_there_is_a_test_split(files):
    there = files({"train.csv": "t\na\n", "test.csv": "t\nb\n"})
    with pytest.raises(
        TaskError, match=r"has a split 'test', so nothing is left for test_share=0.2"
    ):
        own(data=str(there), kind="causal-lm", text="t", test_share=0.2)


def test_the_words_na_and_null_are_text_and_not_empty_cells(files):
    there = files({"train.csv": "t\nNA\nnull\nNone\n", "test.csv": "t\nnan\n"})
    task = own(data=str(there), kind="causal-lm", text="t")
    assert [e.text for e in [*task.train, *task.test]] == ["NA", "null", "None", "nan"]


def test_answers_may_be_lists_and_squads_own_form(files):
    line = '{"q": "Who?", "p": "Ada and Ada.", "a": {"text": ["Ada"], "answer_start": [8]}, "l": ["x", "y"]}\n'
    there = files({"train.jsonl": line, "test.jsonl": line})
    (example,) = own(
        data=str(there), kind="question-answering", text="q", pair="p", answer="a"
    ).train
    assert example.span == (8, 11)
    (example,) = own(data=str(there), kind="seq2seq", text="q", answer="l").train
    assert (example.answer, example.accepted) == ("x", ("x", "y"))
    files({"test.jsonl": line.replace('["x", "y"]', "[]")})
    with pytest.raises(TaskError, match=r"test, row 0 .*column 'l': there is no answer"):
        own(data=str(there), kind="seq2seq", text="q", answer="l")


def test_rows_with_an_empty_cell_are_dropped_on_request_and_counted(files):
    there = files({"my.csv": CSV + ",3\nlast,\n"}) / "my.csv"
    options = {"kind": "classification", "text": "review", "label": "stars", "empty": "drop"}
    task = own(data=str(there), **options)
    assert len(task.train) + len(task.test) == 60
    assert task.facts["train_rows_dropped_empty"] == 2
    assert task.facts["train_first_dropped"] == "row 60, column 'review'"


def test_an_unknown_ending_or_place_is_an_error(files):
    there = files({"my.xlsx": "x"}) / "my.xlsx"
    options = {"kind": "causal-lm", "text": "t"}
    with pytest.raises(TaskError, match=r"my.xlsx cannot be read: a file ends in .csv, .json"):
        own(data=str(there), **options)
    with pytest.raises(TaskError, match=r"'my.csv' is no file or folder.*OWNER/NAME"):
        own(data="my.csv", **options)


def test_a_name_on_the_hub_is_opened_there(monkeypatch):
    opened = []

    def load(source, names, data):
        opened.append((source.hub, source.config, names[0], data))
        return Opened(datasets.Dataset.from_list(REVIEWS), "0")

    monkeypatch.setattr(own_module, "open_split", load)
    task = own(
        data="somebody/reviews", config="en", kind="classification", text="review", label="stars",
        test_split="validation",
    )  # fmt: skip
    assert opened == [
        ("somebody/reviews", "en", "train", None),
        ("somebody/reviews", "en", "validation", None),
    ]
    assert len(task.train) == len(task.test) == 60


def test_examples_shown_first_come_from_train(files, tokenizer):
    text = "q,a\n" + "".join(f"Q{n}?,A{n}\n" for n in range(20))
    there = files({"train.csv": text, "test.csv": "q,a\nLast?,x\n"})
    task = own(data=str(there), kind="causal-lm", text="q", answer="a", shots=2)
    shown = task.render(task.test[0], tokenizer)
    assert shown.text.endswith("\n\nLast?")
    assert shown.secrets == ("Last?",)
    first = shown.text.split("?")[0]
    assert first not in {e.text[:-1] for e in task.train}
    assert len(task.train) == 18
