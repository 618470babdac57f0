"""GLUE in the hub's and the distributed schema: the same examples, GLUE's own metrics."""

from __future__ import annotations

import pytest
from datasets import ClassLabel, Features, Value

from vflair_core.errors import TaskError
from vflair_tasks import glue

TEXT = Value("string")


def rows_of(split):
    return [(e.text, e.pair, e.label) for e in split]


def hub_features(names, *columns):
    label = ClassLabel(names=names) if names else Value("float32")
    return Features({**dict.fromkeys(columns, TEXT), "label": label, "idx": Value("int32")})


# Of each task: the columns and classes of the hub, then the distributed header and two rows of it.
LAYOUTS = {
    "cola": (["sentence"], ["unacceptable", "acceptable"], "CoLA", None, "gj04\t{1}\t*\t{0}", (0, 1)),
    "sst2": (["sentence"], ["negative", "positive"], "SST-2", "sentence\tlabel", "{0}\t{1}", (0, 1)),
    "stsb": (
        ["sentence1", "sentence2"], None, "STS-B",
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        "0\tnews\tMSR\t2012\t1\tnone\tnone\t{0}\t{2}\t{1}", (0.5, 4.25),
    ),
    "mrpc": (
        ["sentence1", "sentence2"], ["not_equivalent", "equivalent"], "MRPC",
        "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", "{1}\t70\t71\t{0}\t{2}", (0, 1),
    ),
    "mnli": (
        ["premise", "hypothesis"], ["entailment", "neutral", "contradiction"], "MNLI",
        "index\tpromptID\tsentence1\tsentence2\tlabel1\tgold_label", "0\t3\t{0}\t{2}\tneutral\t{1}",
        ("contradiction", "entailment"),
    ),
    "mnli-mismatched": (
        ["premise", "hypothesis"], ["entailment", "neutral", "contradiction"], "MNLI",
        "index\tpromptID\tsentence1\tsentence2\tlabel1\tgold_label", "0\t3\t{0}\t{2}\tneutral\t{1}",
        ("neutral", "contradiction"),
    ),
    "qnli": (
        ["question", "sentence"], ["entailment", "not_entailment"], "QNLI",
        "index\tquestion\tsentence\tlabel", "0\t{0}\t{2}\t{1}", ("not_entailment", "entailment"),
    ),
    "qqp": (
        ["question1", "question2"], ["not_duplicate", "duplicate"], "QQP",
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "1\t2\t3\t{0}\t{2}\t{1}", (0, 1),
    ),
    "wnli": (
        ["sentence1", "sentence2"], ["not_entailment", "entailment"], "WNLI",
        "index\tsentence1\tsentence2\tlabel", "0\t{0}\t{2}\t{1}", (0, 1),
    ),
    "rte": (
        ["sentence1", "sentence2"], ["entailment", "not_entailment"], "RTE",
        "index\tsentence1\tsentence2\tlabel", "0\t{0}\t{2}\t{1}", ("not_entailment", "entailment"),
    ),
}  # fmt: skip
# A lone quote, the word null and the word NA are text in GLUE's files.
FIRST = ('He said "yes and left.', "null")
SECOND = ("NA", "They drank it.")


@pytest.mark.parametrize("name", LAYOUTS)
def test_hub_and_distributed_files_give_the_same_examples(name, hub, files):
    columns, classes, folder, header, line, labels = LAYOUTS[name]
    texts = [FIRST, SECOND]
    config = name.partition("-")[0]
    end = {"mnli": "_matched", "mnli-mismatched": "_mismatched"}.get(name, "")
    rows = []
    for number, (pair, label) in enumerate(zip(texts, labels, strict=True)):
        index = classes.index(label) if isinstance(label, str) else label
        rows.append({**dict(zip(columns, pair, strict=False)), "label": index, "idx": number})
    features = hub_features(classes, *columns)
    hub("train", rows, features, config)
    there = hub(f"validation{end}", rows[::-1], features, config)
    body = [line.format(a, label, b) for (a, b), label in zip(texts, labels, strict=True)]
    head = [header] if header else []
    given = files(
        {
            f"{folder}/train.tsv": "\n".join([*head, *body]) + "\n",
            f"{folder}/dev{end}.tsv": "\n".join([*head, *body[::-1]]) + "\n",
        }
    )
    make = getattr(glue, name.replace("-", "_"))
    hubs, distributed = make(data=str(there)), make(data=str(given))
    expected = [
        (a, b if len(columns) == 2 else None, row["label"])
        for (a, b), row in zip(texts, rows, strict=True)
    ]
    assert rows_of(hubs.train) == rows_of(distributed.train) == expected
    assert rows_of(hubs.test) == rows_of(distributed.test) == expected[::-1]
    assert all(e.private is None and e.private_pair is None for e in hubs.train)
    assert hubs.kind == make.card.kind


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_first_metric_is_the_one_on_the_card_and_1_for_the_truth(name, hub):
    columns, classes, *_ = LAYOUTS[name]
    end = {"mnli": "_matched", "mnli-mismatched": "_mismatched"}.get(name, "")
    rows = [{**dict.fromkeys(columns, "some text"), "label": n, "idx": n} for n in (0, 1, 1, 0)]
    features = hub_features(classes, *columns)
    hub("train", rows, features)
    there = hub(f"validation{end}", rows, features)
    make = getattr(glue, name.replace("-", "_"))
    task = make(data=str(there))
    scores = task.score([e.label for e in task.test], task.test)
    assert next(iter(scores)) == make.card.metric
    assert scores[make.card.metric] == pytest.approx(1.0)
    wrong = task.score([1 - e.label for e in task.test], task.test)
    assert wrong[make.card.metric] == 0


def test_rows_of_qqp_that_lack_a_question_or_a_label_are_dropped_and_counted(files):
    header = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
    good = "1\t2\t3\tIs it?\tIt is?\t1\n"
    there = files(
        {
            "QQP/train.tsv": header + good + "4\t5\t6\t\tWhy?\t0\n" + "7\t8\n" + good,
            "QQP/dev.tsv": header + good,
        }
    )
    task = glue.qqp(data=str(there))
    assert rows_of(task.train) == [("Is it?", "It is?", 1)] * 2
    assert task.facts["train_rows_dropped_empty"] == 2
    assert task.facts["train_first_dropped"] == "row 1, column 'question1'"


def test_the_unlabelled_test_set_of_glue_cannot_be_taken_for_a_labelled_one(hub):
    features = Features({"sentence": TEXT, "label": Value("int64")})
    hub("train", [{"sentence": "Good.", "label": 1}], features)
    there = hub("validation", [{"sentence": "Good.", "label": -1}], features)
    with pytest.raises(TaskError, match=r"split validation, row 0.*'label': -1 is none of the 2"):
        glue.sst2(data=str(there))


def test_a_limit_draws_rows_by_the_seed_and_never_one_twice(hub):
    features = hub_features(["negative", "positive"], "sentence")
    rows = [{"sentence": f"text {n}", "label": n % 2, "idx": n} for n in range(50)]
    hub("train", rows, features)
    there = str(hub("validation", rows, features))
    first, again, other = (
        [e.text for e in glue.sst2(data=there, limit=20, seed=seed).train] for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other
    assert len(set(first)) == 20
    assert first != sorted(first, key=lambda text: int(text.split()[1]))
    assert len(glue.sst2(data=there, limit=99, test_limit=3).test) == 3
    with pytest.raises(TaskError, match=r"limit=0 leaves nothing"):
        glue.sst2(data=there, limit=0)


def test_public_text_is_added_on_request_and_shares_no_13_words_with_an_example(hub):
    features = hub_features(["negative", "positive"], "sentence")
    plain = [{"sentence": "Good.", "label": 1, "idx": 0}]
    hub("train", plain, features)
    there = str(hub("validation", plain, features))
    assert glue.sst2(data=there).public == ()
    public = glue.sst2(data=there, public_characters=20_000).public
    long = next(text for text in public if len(text.split()) > 40)
    quoting = [{"sentence": f"Quote: {' '.join(long.split())}", "label": 1, "idx": 0}]
    hub("train", quoting, features)
    task = glue.sst2(data=there, public_characters=20_000)
    assert long not in task.public
    assert set(task.public) < set(public)
    assert task.facts["public_documents_removed_for_overlap"] >= 1


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("nowhere", r"data='nowhere' does not exist.*from the hub"),
        (None, r"Cannot load the split 'train' of 'nyu-mll/glue'.*data = \"FOLDER\""),
    ],
)
def test_data_that_cannot_be_found_is_an_error_that_says_how_to_give_it(data, words, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(TaskError, match=words):
        glue.sst2(data=data)


def test_a_folder_without_the_split_is_an_error_that_names_what_is_there(files):
    there = files({"SST-2/tain.tsv": "sentence\tlabel\na\t1\n"})
    with pytest.raises(TaskError, match=r"no file of the split train; there are tain.tsv. Name it"):
        glue.sst2(data=str(there))


def test_one_file_is_refused_where_two_splits_are_needed(files):
    there = files({"train.tsv": "sentence\tlabel\na\t1\n"})
    with pytest.raises(TaskError, match=r"is one file, and nyu-mll/glue has a train and a test"):
        glue.sst2(data=str(there / "train.tsv"))


def test_a_missing_column_is_an_error_with_a_hint(files):
    there = files({"train.csv": "sentense,label\na,1\n", "dev.csv": "sentense,label\na,1\n"})
    with pytest.raises(TaskError, match=r"no column 'sentence'.*Did you mean 'sentense'"):
        glue.sst2(data=str(there))


def test_a_file_that_changed_is_read_again(files):
    contents = {"train.tsv": "sentence\tlabel\nold\t1\n", "dev.tsv": "sentence\tlabel\nx\t1\n"}
    there = files(contents)
    before = glue.sst2(data=str(there))
    files({**contents, "train.tsv": "sentence\tlabel\nnew\t0\n"})
    after = glue.sst2(data=str(there))
    assert [before.train[0].text, after.train[0].text] == ["old", "new"]
    assert before.facts["train_sha256"] != after.facts["train_sha256"]
