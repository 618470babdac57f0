"""Secrets inside the user's own text: by regular expression, by a column of spans; they are what attacks are graded on."""

from __future__ import annotations

import json
import re

import pytest

from vflair_core import Partition, split
from vflair_core.errors import TaskError
from vflair_core.experiments.capture import record_victims
from vflair_core.experiments.grading.truth import truth_of
from vflair_core.testing import tiny_model
from vflair_tasks.own import own

MAIL = r"[\w.]+@[\w.]+\w"
ROWS = [
    "Write to ada@home.example or call 0123-456 today.",
    "Nobody is here.",
    "Bob (bob.x@work.example) has 7777-888.",
]


def both(tmp_path, rows, ending="jsonl"):
    for name in ("train", "test"):
        (tmp_path / f"{name}.{ending}").write_text("\n".join(map(json.dumps, rows)))
    return str(tmp_path)


def test_what_a_pattern_matches_is_secret_and_nothing_else(tmp_path):
    folder = both(tmp_path, [{"t": text} for text in ROWS])
    task = own(data=folder, kind="causal-lm", text="t", private_patterns=[MAIL, r"\b(\d{4})-\d{3}"])
    # By hand: of the second pattern only what its group matches.
    assert [e.secrets for e in task.train] == [
        ("ada@home.example", "0123"), (), ("bob.x@work.example", "7777"),
    ]  # fmt: skip
    assert [e.private for e in task.test][1] == ()
    assert task.facts["train_examples_without_secrets"] == 1


def test_a_column_of_spans_says_where_the_secrets_are(tmp_path):
    rows = [
        {"t": ROWS[0], "s": [[9, 25], [34, 42]]},
        {"t": ROWS[1], "s": None},
        {"t": ROWS[2], "s": [{"start": 0, "end": 3}]},
    ]
    task = own(data=both(tmp_path, rows), kind="causal-lm", text="t", private_spans="s")
    assert [e.secrets for e in task.train] == [("ada@home.example", "0123-456"), (), ("Bob",)]


def test_spans_in_a_csv_are_json_and_join_with_patterns(tmp_path):
    content = (
        't,s\n"Bob (bob.x@work.example) has 7777-888.","[[0, 3], [5, 9]]"\nx Bob,"[2, 5]"\nx,\n'
    )
    for name in ("train", "test"):
        (tmp_path / f"{name}.csv").write_text(content)
    task = own(
        data=str(tmp_path), kind="causal-lm", text="t", private_spans="s", private_patterns=[MAIL]
    )
    # [5, 9] lies in what the pattern matches: one secret.
    assert [e.secrets for e in task.train] == [("Bob", "bob.x@work.example"), ("Bob",), ()]


@pytest.mark.parametrize("span", [[9, 60], [5, 5], [-1, 3]])
def test_a_span_outside_of_its_text_is_refused_by_row(span, tmp_path):
    folder = both(tmp_path, [{"t": "Ada", "s": [[0, 1]]}, {"t": ROWS[0], "s": [span]}])
    with pytest.raises(
        TaskError, match=rf"row 1 .*column 's': \[{span[0]}, {span[1]}\] is no span"
    ):
        own(data=folder, kind="causal-lm", text="t", private_spans="s")


@pytest.mark.parametrize(
    "cell", ["x", [1], [[1]], [{"start": 1}], [[0.5, 1]], [["a", "b"]]], ids=str
)
def test_what_is_no_list_of_spans_is_refused_by_row(cell, tmp_path):
    folder = both(tmp_path, [{"t": "Ada", "s": cell}])
    with pytest.raises(TaskError, match=r"row 0 .*column 's'"):
        own(data=folder, kind="causal-lm", text="t", private_spans="s")


def test_secrets_of_the_second_text_have_a_column_of_their_own(tmp_path):
    rows = [{"q": "Whose is 0123?", "p": ROWS[0], "a": "hers", "s": [[9, 12]]}]
    options = {
        "data": both(tmp_path, rows),
        "kind": "causal-lm",
        "text": "q",
        "pair": "p",
        "answer": "a",
    }
    (example,) = own(private_pair_spans="s", **options).train
    assert (example.private, example.secrets) == ((), ("ada",))
    (example,) = own(private_patterns=[r"\d{4}"], **options).train
    assert example.secrets == ("0123", "0123")
    (example,) = own(private_patterns=[r"\d{4}"], private=["p"], **options).train
    assert (example.private, example.secrets) == ((), ("0123",))
    with pytest.raises(TaskError, match="there is no pair"):
        own(data=options["data"], kind="causal-lm", text="q", private_pair_spans="s")


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        (["(open"], r"'\(open' is no regular expression.*single quotes"),
        ([r"\d*"], "matches nothing at all"),
        (r"\d+", "is a list"),
        (["zebra"], r"mark nothing in any of the 3 train examples"),
    ],
)
def test_a_pattern_that_marks_nothing_is_refused(patterns, words, tmp_path):
    folder = both(tmp_path, [{"t": text} for text in ROWS])
    with pytest.raises(TaskError, match=words):
        own(data=folder, kind="causal-lm", text="t", private_patterns=patterns)


@pytest.mark.parametrize("prompt", [None, "Note: {t}\nSummary:"])
def test_they_are_what_victims_secrets_are_graded_on(prompt, tmp_path, tokenizer):
    rows = [{"t": text, "a": "yes"} for text in ROWS]
    task = own(
        data=both(tmp_path, rows), kind="causal-lm", text="t", answer="a", private_patterns=[MAIL],
        prompt=prompt,
    )  # fmt: skip
    model = tiny_model("llama", vocab_size=len(tokenizer))
    party, _ = split(model, Partition(1, 1), tokenizer=tokenizer, seed=0)
    party.take_up(task)
    victims = [task.row("train", n) for n in range(3)]
    crossed = record_victims(party, victims, max_length=256, gradients=False)
    truth = truth_of(party.preprocessor(256), victims, crossed.rows)
    assert truth.secrets == [tuple(re.findall(MAIL, text)) for text in ROWS]
    for n, text in enumerate(ROWS):
        said = tokenizer.decode(truth.tokens[n][truth.private[n]])
        assert said.replace(" ", "") == "".join(re.findall(MAIL, text))
