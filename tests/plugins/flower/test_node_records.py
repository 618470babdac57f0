"""A node's records: read from three kinds of files, and shown in every epoch once."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("flwr.serverapp", reason="Flower is not installed: nox -s flower")


from support.flower_witness import rows_of
from vflair_core import TaskError
from vflair_flower.node_records import Rows, read_texts

TEXTS = ["one, with a comma", 'two "quoted"', "three ünï"]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".txt"])
def test_three_kinds_of_files_hold_the_same_texts(tmp_path, suffix):
    file = tmp_path / f"records{suffix}"
    if suffix == ".jsonl":
        content = "".join(
            json.dumps({"n": n, "text": text}) + "\n\n" for n, text in enumerate(TEXTS)
        )
    elif suffix == ".csv":
        rows = ['1,"{}"'.format(text.replace('"', '""')) for text in TEXTS]
        content = "\n".join(["n,text", *rows]) + "\n"
    else:
        content = "\n\n".join(TEXTS)
    file.write_text(content, encoding="utf-8")
    assert read_texts(file, "text") == TEXTS


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"text": "secret"}\n{"text": ', "line 2 is no JSON"),
        ("a.jsonl", '{"other": "secret"}', "line 1 has no text in the column 'text'"),
        ("a.jsonl", '["secret"]', "line 1 has no text in the column 'text'"),
        ("a.csv", "other\nsecret\n", "line 2 has no text in the column 'text'"),
        ("a.txt", "\n \n", "has no text"),
        ("a.txt", "secret \udcff", "cannot be read: UnicodeDecodeError"),
    ],
)
def test_files_that_are_none_are_refused_without_a_word_of_them(tmp_path, name, content, words):
    file = tmp_path / name
    file.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(TaskError, match=words) as refused:
        read_texts(file, "text")
    assert "secret" not in str(refused.value)


def test_a_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(TaskError, match=r"none\.txt cannot be read: FileNotFoundError"):
        read_texts(tmp_path / "none.txt", "text")


def test_each_epoch_shows_every_record_once_in_an_order_of_its_own():
    texts = [f"record {n}" for n in range(7)]
    rows = Rows(texts, size=2, seed=5)
    shown = [text for step in range(14) for text in rows(step)]
    epochs = [shown[n : n + 7] for n in range(0, 28, 7)]
    assert all(sorted(epoch) == texts for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert [rows(step) for step in range(14)] == [rows_of(texts, 2, n, seed=5) for n in range(14)]
