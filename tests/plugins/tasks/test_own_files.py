"""Text of the user's own files is what the file has; what cannot be said for sure is refused by file, row and column."""

from __future__ import annotations

import csv as csv_module
import datetime as dt
import decimal
import json
import uuid

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vflair_core.errors import TaskError
from vflair_tasks.own import own

UGLY = [
    "07000000", "1.50", "true", "False", "null", "NA", "nan", "None", "-inf", "2024-01-01", "12:30", "0", "0.0", "1e5",
    "12345678901234567890", "$1,234.00", "0x1F", "yes", "[1, 2]", '{"a": 1}', "#5", "a;b", "=1+1", "ünï 漢字 😀", " x ",
]  # fmt: skip


def texts(task):
    return [example.text for example in [*task.train, *task.test]]


def answers(task):
    return [example.answer for example in [*task.train, *task.test]]


def write(path, ending, rows, *, separator=None, quoting=csv_module.QUOTE_MINIMAL):
    """Write columns t and a by other programs' rules: csv's module, json, pyarrow."""
    if ending in ("csv", "tsv"):
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv_module.writer(
                stream, delimiter=separator or {"csv": ",", "tsv": "\t"}[ending], quoting=quoting
            )
            writer.writerow(["t", "a"])
            writer.writerows(rows)
    elif ending == "parquet":
        pq.write_table(pa.table({"t": [r[0] for r in rows], "a": [r[1] for r in rows]}), path)
    else:
        objects = [{"t": text, "a": answer} for text, answer in rows]
        lines = "\n".join(map(json.dumps, objects)) if ending == "jsonl" else json.dumps(objects)
        path.write_text(lines, encoding="utf-8")


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "json", "parquet"])
@pytest.mark.parametrize("column", [UGLY, *[[text] * 3 for text in UGLY]], ids=str)
def test_text_is_what_the_file_has(ending, column, tmp_path):
    rows = [(text, text) for text in column]
    (tmp_path / "d").mkdir()
    for split in ("train", "test"):
        write(tmp_path / "d" / f"{split}.{ending}", ending, rows)
    task = own(
        data=str(tmp_path / "d"), kind="causal-lm", text="t", answer="a",
        **({"quoting": "double"} if ending == "tsv" and any('"' in t for t in column) else {}),
    )  # fmt: skip
    assert texts(task) == answers(task) == column * 2


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(str.strip), min_size=1, max_size=5))  # fmt: skip
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None
)
def test_any_text_comes_back_out_of_csv_and_json(tmp_path, column):
    for ending in ("csv", "jsonl", "json"):
        folder = tmp_path / uuid.uuid4().hex
        folder.mkdir()
        for split in ("train", "test"):
            write(
                folder / f"{split}.{ending}", ending, [(text, "a") for text in column],
                quoting=csv_module.QUOTE_ALL,
            )  # fmt: skip
        assert texts(own(data=str(folder), kind="causal-lm", text="t", answer="a")) == column * 2


def both(tmp_path, name, content):
    """Write one content as train and as test; return the folder."""
    raw = content if isinstance(content, bytes) else content.encode()
    for split in ("train", "test"):
        (tmp_path / f"{split}.{name}").write_bytes(raw)
    return str(tmp_path)


# -- json and parquet ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        ("0", "0"), ("false", "false"), ("1.50", "1.50"), ("-0.0", "-0.0"), ("1e5", "1e5"), ('"0"', "0"),
        ("12345678901234567890.10", "12345678901234567890.10"), ("true", "true"), ("NaN", "NaN"), ('""x""'[1:-1], "x"),
    ],
)  # fmt: skip
def test_an_answer_of_0_or_false_is_an_answer_as_it_is_written(cell, text, tmp_path):
    folder = both(tmp_path, "jsonl", f'{{"t": "q", "a": {cell}}}\n')
    assert answers(own(data=folder, kind="seq2seq", text="t", answer="a")) == [text, text]
    folder = both(tmp_path, "jsonl", f'{{"t": "q", "a": [{cell}, "y"]}}\n')
    (example,) = own(data=folder, kind="seq2seq", text="t", answer="a").train
    assert example.accepted == (text, "y")


@pytest.mark.parametrize("cell", ['""', '" "', "null", "[]", '[""]'])
def test_an_empty_answer_is_none(cell, tmp_path):
    folder = both(tmp_path, "jsonl", f'{{"t": "q", "a": "x"}}\n{{"t": "q", "a": {cell}}}\n')
    with pytest.raises(TaskError, match=r"row 1 \(the first is 0\), column 'a'"):
        own(data=folder, kind="seq2seq", text="t", answer="a")


def test_a_column_of_mixed_types_is_text(tmp_path):
    cells = ['"x"', "1", "2.50", "true", "null", '"y"']
    rows = "".join(
        f'{{"t": {cell}, "other": {n if n % 2 else [n]}}}\n' for n, cell in enumerate(cells)
    )
    task = own(data=both(tmp_path, "jsonl", rows), kind="causal-lm", text="t", empty="drop")
    assert texts(task) == ["x", "1", "2.50", "true", "y"] * 2
    assert task.facts["train_rows_dropped_empty"] == 1


CHAT = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada"}]}


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "json"])
def test_a_path_goes_into_lists_and_objects(ending, tmp_path):
    for split in ("train", "test"):
        place = tmp_path / f"{split}.{ending}"
        if ending == "parquet":
            pq.write_table(pa.Table.from_pylist([CHAT] * 3), place)
        else:
            place.write_text(json.dumps([CHAT] * 3) if ending == "json" else json.dumps(CHAT))
    task = own(
        data=str(tmp_path),
        kind="causal-lm",
        text="messages[0].content",
        answer="messages[-1].content",
    )
    assert (task.train[0].text, task.train[0].answer) == ("Who?", "Ada")
    prompted = own(
        data=str(tmp_path), kind="causal-lm", text="messages[0].content", answer="messages[-1].content",
        prompt="Q: {messages[0].content}",
    )  # fmt: skip
    assert prompted.render(prompted.train[0], None).text == "Q: Who?"


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("cell", "options", "words"),
    [
        (CHAT["messages"], {}, r"row 1.*column 't'.*is a list of 2 and no text.*t\[-1\].content"),
        ({"x": "y"}, {}, r"row 1.*column 't'.*is an object and no text.*t\.x"),
        (["a", "b"], {}, r"row 1.*column 't'.*is a list of 2 and no text.*t\[0\].*join = "),
        (["a", "b"], {"text": "t[2]"}, r"row 1.*column 't\[2\]': there is no \[2\] in a list of 2"),
        ({"x": "y"}, {"text": "t.z"}, r"row 1.*column 't\.z': there is no 'z' in an object of x"),
        (["a", "b"], {"text": "t.z"}, r"row 1.*column 't\.z'.*is no object"),
    ],
)  # fmt: skip
def test_what_is_nested_is_refused_by_row_and_column(ending, cell, options, words, tmp_path):
    rows = [{"t": None}, {"t": cell}]
    for split in ("train", "test"):
        if ending == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{split}.parquet")
        else:
            (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(TaskError, match=words):
        own(data=str(tmp_path), **{"kind": "causal-lm", "text": "t", "empty": "drop"} | options)


def test_token_lists_are_joined_by_what_the_user_says(tmp_path):
    folder = both(tmp_path, "jsonl", '{"t": ["Ada", "was", 1]}\n{"t": "plain"}\n')
    assert (
        texts(own(data=folder, kind="causal-lm", text="t", join=" ")) == ["Ada was 1", "plain"] * 2
    )


PLACED = [
    {"text": ["Ada", "Ada L."], "answer_start": [8, 0]},
    [{"text": "Ada", "answer_start": 8}],
    {"text": "Ada", "answer_start": 8},
]


@pytest.mark.parametrize("form", PLACED, ids=str)
@pytest.mark.parametrize("ending", ["jsonl", "parquet", "csv"])
def test_answers_in_the_forms_of_squad_say_where_they_start(form, ending, tmp_path):
    row = {"q": "Who?", "p": "Ada L., Ada.", "a": form}
    for split in ("train", "test"):
        place = tmp_path / f"{split}.{ending}"
        if ending == "parquet":
            pq.write_table(pa.Table.from_pylist([row]), place)
        elif ending == "csv":
            with place.open("w", newline="") as stream:
                writer = csv_module.DictWriter(stream, row)
                writer.writeheader()
                writer.writerow(row | {"a": json.dumps(form)})
        else:
            place.write_text(json.dumps(row))
    (example,) = own(
        data=str(tmp_path), kind="question-answering", text="q", pair="p", answer="a"
    ).train
    assert (example.span, example.answer) == ((8, 11), "Ada")


def test_an_answer_that_stands_elsewhere_than_it_says_is_refused(tmp_path):
    row = {"q": "Who?", "p": "Ada.", "a": {"text": ["Ada"], "answer_start": [1]}}
    folder = both(tmp_path, "jsonl", json.dumps(row))
    options = {"kind": "question-answering", "text": "q", "pair": "p", "answer": "a"}
    with pytest.raises(TaskError, match=r"row 0.*column 'a'.*does not stand.*at character 1"):
        own(data=folder, **options)
    row["a"]["answer_start"] = [0, 1]
    folder = both(tmp_path, "jsonl", json.dumps(row))
    with pytest.raises(TaskError, match=r"row 0.*column 'a': there are 1 texts and 2 places"):
        own(data=folder, **options)


def test_types_of_a_parquet_file_become_text(tmp_path):
    table = pa.table(
        {
            "n": pa.array([7, None], pa.int64()),
            "d": pa.array([decimal.Decimal("1.50"), decimal.Decimal("2.00")]),
            "t": pa.array([dt.date(2024, 1, 1)] * 2),
            "b": pa.array([False, True]),
            "s": pa.array(["x", "y"]).dictionary_encode(),
        }
    )
    for split in ("train", "test"):
        pq.write_table(table, tmp_path / f"{split}.parquet")
    for column, wanted in {"d": ["1.50", "2.00"], "t": ["2024-01-01"] * 2, "b": ["false", "true"], "s": ["x", "y"]}.items():  # fmt: skip
        assert texts(own(data=str(tmp_path), kind="causal-lm", text=column)) == wanted * 2
    assert texts(own(data=str(tmp_path), kind="causal-lm", text="n", empty="drop")) == ["7"] * 2
    task = own(data=str(tmp_path), kind="classification", text="s", label="b")
    assert (task.labels, [e.label for e in task.train]) == (("false", "true"), [0, 1])


def test_pictures_in_a_parquet_file_stay_beside_nested_columns(tmp_path):
    from PIL import Image

    picture = Image.new("RGB", (4, 4), (255, 0, 0))
    features = datasets.Features(
        {"i": datasets.Image(), "q": [datasets.Value("string")], "a": datasets.Value("int64")}
    )
    table = datasets.Dataset.from_list([{"i": picture, "q": ["x", "What?"], "a": 0}], features)
    for split in ("train", "test"):
        table.to_parquet(tmp_path / f"{split}.parquet")
    (example,) = own(
        data=str(tmp_path), kind="image-text", text="q[1]", image="i", answer="a"
    ).train
    assert (example.text, example.answer) == ("What?", "0")
    assert example.images[0].getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "jsonl",
            '{"t": "a"}\n{"t": \n',
            r"does not parse as jsonl: row 1 \(the first is 0\), line 2",
        ),
        ("jsonl", '{"t": "a"}\n[1]\n', r"row 1 \(the first is 0\) is .* no object of columns"),
        ("jsonl", '{"t": "a", "t": "b"}\n', r"row 0.*the key 't' is there twice"),
        ("jsonl", '{"x": "a"}\n', r"no column 't'. It has: x"),
        ("jsonl", "\n \n", r"is empty"),
        ("jsonl", '{"t": "\\ud800"}\n', r"Row 0.*column 't'.*half a sign"),
        ("json", "[]", r"has no rows"),
        ("json", '[{"t": "a"} {"t": "b"}]', r"after row 0 .* neither , nor \]"),
        ("json", '[{"t": "a"}, 5]', r"row 1 .* no object of columns"),
        ("json", '{\n"t": ["a", "b"]\n}', r"one object \(t\) and 0 lists of rows"),
        ("parquet", "no parquet", r"does not parse as parquet.*nothing of it was kept"),
    ],
)
def test_a_file_that_is_no_json_or_parquet_is_refused_by_row(name, content, words, tmp_path):
    with pytest.raises(TaskError, match=words):
        own(data=both(tmp_path, name, content), kind="causal-lm", text="t")


def test_json_may_be_a_list_an_object_with_one_or_lines(tmp_path):
    for content in (
        '[{"t": "a"},\n {"t": "b"}]\n', '{\n"data": [{"t": "a"}, {"t": "b"}], "version": 1}', '{"t": "a"}\n{"t": "b"}',
        '\ufeff[{"t": "a"}, {"t": "b"}]',
    ):  # fmt: skip
        assert (
            texts(own(data=both(tmp_path, "json", content), kind="causal-lm", text="t"))
            == ["a", "b"] * 2
        )


# -- csv and tsv -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_byte_order_marks_and_line_ends_are_no_text(end, mark, tmp_path):
    content = f"{mark}t,a{end}x,1{end}{end}y,2{end}{end}"
    task = own(data=both(tmp_path, "csv", content), kind="seq2seq", text="t", answer="a")
    assert list(zip(texts(task), answers(task), strict=True)) == [("x", "1"), ("y", "2")] * 2


def test_a_quote_in_a_tsv_is_a_sign_like_others(tmp_path):
    column = ['"unbalanced', 'he said "', '"two words"', '5" pipe', '"', "x"]
    content = "t\ta\n" + "".join(f"{text}\t1\n" for text in column)
    task = own(data=both(tmp_path, "tsv", content), kind="seq2seq", text="t", answer="a")
    assert texts(task) == column * 2


def test_a_tsv_that_looks_quoted_is_refused_until_somebody_says_what_quotes_are(tmp_path):
    content = 't\ta\nx\t1\n"he said ""no"""\t2\n'
    folder, options = (
        both(tmp_path, "tsv", content),
        {"kind": "seq2seq", "text": "t", "answer": "a"},
    )
    with pytest.raises(
        TaskError, match=r'row 1 .*looks quoted.*quoting = "double".*quoting = "none"'
    ):
        own(data=folder, **options)
    assert texts(own(data=folder, quoting="double", **options)) == ["x", 'he said "no"'] * 2
    assert texts(own(data=folder, quoting="none", **options)) == ["x", '"he said ""no"""'] * 2
    tab = both(tmp_path, "tsv", 't\ta\n"x\ty"\t1\n')
    with pytest.raises(
        TaskError, match=r'row 0.*3 cells and the header has 2.*quoting = "double" every row has 2'
    ):
        own(data=tab, **options)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('t,a\nx,1\n"open,2\ny,3\nz,4\n', r'row 1 .*a quote opens a cell.*quoting = "none" every row has 2'),
        ('t,a\nx,1\n"a"b,2\n', r"row 1 .*a quote opens a cell"),
        ("t;a\nx;1\n", r"no column '[ta]'. It has: t;a.*separator = \";\""),
        ("t,a\nx,1\ny\n", r"row 1 .*it has 1 cell and the header has 2"),
        ("t,a\nx,y,1\n", r"row 0 .*it has 3 cells and the header has 2"),
        ("t,a,t\nx,1,y\n", r"has the column 't' 2 times.*Rename"),
        ("\ufeff", r"is empty"),
        ("\n\n", r"is empty"),
        ("t,a\n", r"has no rows"),
        (b"t,a\nx,1\ncaf\xe9,2\n", r'line 2 .*not text in the encoding utf-8.*encoding = "cp1252" it reads .caf\u00e9,2'),
        ("t,a\nx,1\n".encode("utf-16"), r'encoding = "utf-16"'),
    ],
)  # fmt: skip
def test_a_file_that_is_written_otherwise_is_an_error_with_a_guess(content, words, tmp_path):
    with pytest.raises(TaskError, match=words):
        own(data=both(tmp_path, "csv", content), kind="seq2seq", text="t", answer="a")


@pytest.mark.parametrize(
    ("content", "options"),
    [
        ("t;a\nx,y;1\n", {"separator": ";"}),
        ('t,a\n"x,y",1\n', {}),
        ('t|a\n"x,y"|1\n'.replace('"', ""), {"separator": "|", "quoting": "none"}),
        ('t,a\n"x,y",1\n'.encode("utf-16"), {"encoding": "utf-16"}),
        ('t,a\n"x,y",1\n'.encode("latin-1"), {"encoding": "latin-1"}),
    ],
)  # fmt: skip
def test_separator_quoting_and_encoding_are_options(content, options, tmp_path):
    folder = both(tmp_path, "csv", content)
    assert texts(own(data=folder, kind="seq2seq", text="t", answer="a", **options)) == ["x,y"] * 2
    escaped = both(tmp_path, "csv", 't,a\n"say \\"x\\"",1\n')
    assert (
        texts(own(data=escaped, kind="causal-lm", text="t", quoting="backslash")) == ['say "x"'] * 2
    )


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("csv", {"separator": "::"}, "not one sign"),
        (
            "csv",
            {"quoting": "single"},
            r"quoting='single' is unknown. Possible: double, backslash, none",
        ),
        ("csv", {"encoding": "utf-9"}, r"encoding='utf-9' is unknown"),
        ("jsonl", {"separator": ","}, r"separator = ',' says how csv and tsv are written"),
        ("parquet", {"encoding": "latin-1"}, r"encoding = 'latin-1' is of files of text"),
    ],
)
def test_an_option_that_means_nothing_here_is_refused(name, options, words, tmp_path):
    for split in ("train", "test"):
        write(tmp_path / f"{split}.{name}", name, [("x", "y")])
    with pytest.raises(TaskError, match=words):
        own(data=str(tmp_path), kind="causal-lm", text="t", **options)


def test_a_cell_may_be_of_any_length_and_the_limit_of_csv_is_put_back(tmp_path):
    before, long = csv_module.field_size_limit(), "word " * 100_000
    task = own(data=both(tmp_path, "csv", f"t\n{long}\nx\n"), kind="causal-lm", text="t")
    assert texts(task) == [long, "x"] * 2
    assert csv_module.field_size_limit() == before


def test_an_empty_line_of_one_column_is_an_empty_cell_unless_it_is_the_last(tmp_path):
    folder = both(tmp_path, "csv", "t\nx\n\ny\n\n\n")
    with pytest.raises(TaskError, match=r"row 1 .*column 't' is empty"):
        own(data=folder, kind="causal-lm", text="t")
    assert texts(own(data=folder, kind="causal-lm", text="t", empty="drop")) == ["x", "y"] * 2


def test_lines_of_a_txt_file_are_texts(tmp_path):
    folder = both(tmp_path, "txt", '\ufeff0123,"x"\r\ntrue\n')
    assert texts(own(data=folder, kind="causal-lm", text="text")) == ['0123,"x"', "true"] * 2


def test_choices_in_a_csv_are_json(tmp_path):
    options = {"kind": "causal-lm", "text": "q", "choices": "c", "label": "y"}
    folder = both(tmp_path, "csv", 'q,c,y\nWhich?,"[""red"", 0]",1\n')
    (example,) = own(data=folder, **options).train
    assert (example.choices, example.label) == (("red", "0"), 1)
    with pytest.raises(TaskError, match=r"row 0.*column 'c': 'red\|blue' is not json"):
        own(data=both(tmp_path, "csv", "q,c,y\nWhich?,red|blue,1\n"), **options)


def test_numbers_of_classes_are_in_the_order_of_numbers_and_no_places_in_it(tmp_path):
    folder = both(tmp_path, "csv", "t,y\n" + "".join(f"x{n},{n}\n" for n in (10, 9, 2, 11)))
    task = own(data=folder, kind="classification", text="t", label="y")
    assert task.labels == ("2", "9", "10", "11")
    (tmp_path / "test.csv").write_text("t,y\nx,1\n")
    with pytest.raises(TaskError, match=r"row 0.*column 'y': 1 is none of the 4 labels"):
        own(data=str(tmp_path), kind="classification", text="t", label="y")


def test_a_column_may_have_a_name_with_any_sign(tmp_path):
    folder = both(tmp_path, "csv", "t: {x}[0],a.b\nWho?,Ada\n")
    task = own(data=folder, kind="causal-lm", text="t: {x}[0]", answer="a.b", shots=0, chat=False)
    assert (task.train[0].text, task.train[0].answer) == ("Who?", "Ada")
    many = "t: {x}[0],a.b\n" + "".join(f"Q{n},A{n}\n" for n in range(4))
    task = own(
        data=both(tmp_path, "csv", many), kind="causal-lm", text="t: {x}[0]", answer="a.b", shots=1
    )
    assert task.render(task.train[0], None).text.endswith(f"\n\n{task.train[0].text}")


def test_an_interrupted_or_changed_file_is_read_anew(tmp_path, own_cache):
    folder = both(tmp_path, "csv", "t,a\nx,1\ny\n")
    with pytest.raises(TaskError):
        own(data=folder, kind="causal-lm", text="t")
    assert not list(own_cache.rglob("*.arrow"))
    assert not list(own_cache.rglob("*.part"))
    assert texts(own(data=both(tmp_path, "csv", "t\nx\n"), kind="causal-lm", text="t")) == ["x"] * 2
    assert texts(own(data=both(tmp_path, "csv", "t\ny\n"), kind="causal-lm", text="t")) == ["y"] * 2


# -- how answers are compared ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "said", "answer", "right"),
    [
        ("squad", "The Harbour!", "harbour", 1), ("squad", "", "A", 0), ("last_number", "so 1,234.0", "It is 1234", 1),
        ("last_number", "5", "-5", 0), ("last_number", "none", "7", 0), ("boxed_formula", r"\boxed{\frac12}", r"\boxed{1/2}", 1),
        ("rougeL", "the cat sat", "the cat sat", 1), ("rougeL", "", "the cat", 0),
    ],
)  # fmt: skip
def test_answers_are_compared_as_the_user_says(metric, said, answer, right, tmp_path):
    folder = both(tmp_path, "jsonl", json.dumps({"t": "q", "a": answer}))
    task = own(data=folder, kind="causal-lm", text="t", answer="a", metric=metric)
    assert next(iter(task.score([said], task.test).values())) == pytest.approx(right)


def test_unless_told_they_are_compared_as_they_are(tmp_path):
    folder = both(tmp_path, "jsonl", '{"t": "q", "a": "x"}')
    options = {"data": folder, "kind": "causal-lm", "text": "t"}
    assert own(answer="a", **options).score is None
    with pytest.raises(TaskError, match=r"metric='sqaud' is unknown.*Did you mean 'squad'"):
        own(answer="a", metric="sqaud", **options)
    with pytest.raises(TaskError, match="compares written answers, and kind 'causal-lm' has none"):
        own(metric="squad", **options)
    with pytest.raises(TaskError, match=r"row 0.*column 'a': there is no number in the answer 'x'"):
        own(answer="a", metric="last_number", **options)


def test_a_tsv_whose_cells_are_all_in_quotes_is_refused_likewise(tmp_path):
    content = '"t"\t"a"\n"x"\t"1"\n"y"\t"2"\n'
    options = {"kind": "seq2seq", "text": "t", "answer": "a"}
    plain = both(tmp_path, "tsv", content.replace('"t"\t"a"', "t\ta"))
    with pytest.raises(TaskError, match=r'row 0 .*looks quoted.*quoting = "double"'):
        own(data=plain, **options)
    assert texts(own(data=plain, quoting="double", **options)) == ["x", "y"] * 2


@pytest.mark.parametrize("number", ["1_000", "١٢"])
def test_a_number_is_one_as_files_write_it(number, tmp_path):
    folder = both(tmp_path, "csv", f"t,a\nx,1.5\ny,{number}\n")
    with pytest.raises(TaskError, match="not a number as files write one"):
        own(data=folder, kind="regression", text="t", label="a")
