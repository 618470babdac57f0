"""Instructions, mathematics, MMLU, summaries, TextVQA: the hub's schema and the authors' give the same examples."""

from __future__ import annotations

import datasets
import pytest
from datasets import ClassLabel, Features, Image, Value
from PIL import Image as Pictures

from vflair_core.errors import TaskError
from vflair_tasks import instructions, mathematics, mmlu, summaries, textvqa

TEXT = Value("string")
INSTRUCTIONS = [
    {"instruction": f"Say {n}", "input": "loudly" if n % 2 else "", "output": f"{n}!"}
    for n in range(40)
]


def test_alpaca_masks_nothing_but_its_template_and_carves_a_test(files, tokenizer):
    there = files({"alpaca_data.json": INSTRUCTIONS * 2})
    task = instructions.alpaca(data=str(there), test_share=0.25)
    train, test = ({e.text for e in split} for split in (task.train, task.test))
    assert not train & test
    assert train | test == {row["instruction"] for row in INSTRUCTIONS}
    assert len(task.train) + len(task.test) == 80
    loud = next(e for e in task.train if e.pair)
    shown = task.render(loud, tokenizer)
    assert f"### Instruction:\n{loud.text}\n\n### Input:\nloudly\n\n### Response:\n" in shown.text
    assert shown.secrets == (loud.text, "loudly")
    quiet = next(e for e in task.train if not e.pair)
    assert "### Input" not in task.render(quiet, tokenizer).text
    assert shown.answer == f"{loud.text[4:]}!"


def test_rows_without_a_response_are_left_out_and_counted(files):
    there = files({"alpaca_data.json": [*INSTRUCTIONS, {**INSTRUCTIONS[0], "output": ""}]})
    task = instructions.alpaca(data=str(there))
    assert len(task.train) + len(task.test) == 40
    assert task.facts["train_rows_dropped_empty"] == 1
    assert task.facts["train_first_dropped"] == "row 40, column 'output'"


def test_dolly_reads_its_own_columns(files, tokenizer):
    lines = [
        f'{{"instruction": "Do {n}", "context": "c{n}", "response": "r{n}", "category": "open_qa"}}'
        for n in range(20)
    ]
    there = files({"databricks-dolly-15k.jsonl": "\n".join(lines)})
    task = instructions.dolly(data=str(there), test_share=0.5)
    example = task.train[0]
    assert (example.pair, example.answer) == (f"c{example.text[3:]}", f"r{example.text[3:]}")
    assert f"Input:\n{example.pair}\n" in task.render(example, tokenizer).text


def test_codealpaca_is_scored_by_bleu_or_by_codebleu_of_a_named_language(files):
    there = str(files({"code_alpaca_20k.json": INSTRUCTIONS}))
    task = instructions.codealpaca(data=there)
    scores = task.score([e.answer for e in task.test], task.test)
    assert next(iter(scores)) == "bleu"
    with pytest.raises(TaskError, match=r"metric='code' is unknown. Possible: bleu, codebleu"):
        instructions.codealpaca(data=there, metric="code")
    with pytest.raises(TaskError, match=r"CodeBLEU is of one language, e.g. metric = \"codebleu\""):
        instructions.codealpaca(data=there, metric="codebleu")


def test_gsm8k_learns_the_solution_without_the_calculators_notes(hub, files, tokenizer):
    row = {"question": "6 × 7?", "answer": "It is 6*7=<<6*7=42>>42.\n#### 42"}
    line = '{"question": "6 × 7?", "answer": "It is 6*7=<<6*7=42>>42.\\n#### 42"}\n'
    there = files({"train.jsonl": line, "test.jsonl": line})
    hub("train", [row], folder="main")
    for task in (
        mathematics.gsm8k(data=str(there)),
        mathematics.gsm8k(data=str(hub("test", [row], folder="main"))),
    ):
        (example,) = task.train
        assert example.answer == "It is 6*7=42.\n#### 42"
        assert task.render(example, tokenizer).text == "Question: 6 × 7?\nAnswer:"


def test_math_reads_a_file_for_each_problem(hub, files):
    problem = {"problem": "1+1?", "level": "Level 1", "type": "Algebra", "solution": r"$\boxed{2}$"}
    there = files({"MATH/train/algebra/1.json": problem, "MATH/test/algebra/9.json": problem})
    hub("train", [problem])
    for task in (
        mathematics.math(data=str(there)),
        mathematics.math(data=str(hub("test", [problem]))),
    ):
        assert [(e.text, e.answer) for e in task.test] == [("1+1?", r"$\boxed{2}$")]
        assert task.score([r"so $\boxed{2}$"], task.test) == {"exact_match": 1}


def test_mmlu_shows_examples_of_the_subject_first_and_asks_for_a_letter(hub, files, tokenizer):
    asked = 'Which, "A"?,one,two,three,four,C\n'.replace('Which, "A"?', '"Which, ""A""?"')
    there = files(
        {
            "data/auxiliary_train/arc.csv": asked,
            "data/dev/high_school_physics_dev.csv": "Dev1?,a,b,c,d,A\nDev2?,a,b,c,d,B\n",
            "data/dev/anatomy_dev.csv": "Other?,a,b,c,d,A\n",
            "data/test/high_school_physics_test.csv": asked,
        }
    )
    features = Features(
        {
            "question": TEXT,
            "subject": TEXT,
            "choices": datasets.List(TEXT),
            "answer": ClassLabel(names=["A", "B", "C", "D"]),
        }
    )
    four = {"choices": ["a", "b", "c", "d"], "subject": "high_school_physics"}
    row = {"question": 'Which, "A"?', "choices": ["one", "two", "three", "four"], "answer": 2}
    hub("auxiliary_train", [row | {"subject": ""}], features, "all")
    hub(
        "dev",
        [
            four | {"question": "Dev1?", "answer": 0},
            four | {"question": "Dev2?", "answer": 1},
            four | {"question": "Other?", "answer": 0, "subject": "anatomy"},
        ],
        features,
        "all",
    )
    hubs = hub("test", [row | {"subject": "high_school_physics"}], features, "all")
    for task in (mmlu.mmlu(data=str(there)), mmlu.mmlu(data=str(hubs))):
        (example,) = task.test
        assert (example.choices, example.label) == (("A", "B", "C", "D"), 2)
        shown = task.render(example, tokenizer)
        assert shown.text == (
            "The following are multiple choice questions (with answers) about high school physics.\n\n"
            "Dev1?\nA. a\nB. b\nC. c\nD. d\nAnswer: A\n\n"
            "Dev2?\nA. a\nB. b\nC. c\nD. d\nAnswer: B\n\n"
            'Which, "A"?\nA. one\nB. two\nC. three\nD. four\nAnswer:'
        )
        assert shown.secrets == ('Which, "A"?', "one", "two", "three", "four")
        assert task.render(task.train[0], tokenizer).text.startswith(
            "The following are multiple choice questions (with answers).\n\nWhich"
        )
        assert task.score([2], task.test) == {"accuracy": 1, "subject_accuracy": 1}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shots": 6}, "shots=6: the development set has 5"),
        ({"train_split": "train"}, "train_split='train' is unknown. Possible: auxiliary_train"),
        ({"train_split": "dev"}, "learns from what is shown first. Set shots = 0"),
        ({"prompt": "{querstion}"}, "asks for {querstion}.*Did you mean 'question'"),
    ],
)
def test_an_impossible_option_of_mmlu_is_an_error(options, words):
    with pytest.raises(TaskError, match=words):
        mmlu.mmlu(data="nowhere", **options)


def test_a_row_of_mmlu_with_a_column_too_few_is_an_error_that_names_it(files):
    there = files({"auxiliary_train/a.csv": "Q?,a,b,c,d,A\nQ?,a,b,c,A\n", "test/a_test.csv": "x"})
    with pytest.raises(TaskError, match=r"a.csv, row 1 has 5 columns and not 6"):
        mmlu.mmlu(data=str(there))


def test_summaries_are_learnt_from_train_and_written_by_either_kind_of_model(hub, tokenizer):
    hub("train", [{"article": "Train news.", "highlights": "News .", "id": "1"}], folder="3.0.0")
    there = str(
        hub("test", [{"article": "Test news.", "highlights": "More .", "id": "2"}], folder="3.0.0")
    )
    task = summaries.cnn_dailymail(data=there)
    assert (task.kind, task.train[0].text, task.test[0].answer) == (
        "seq2seq",
        "Train news.",
        "More .",
    )
    assert task.render(task.test[0], tokenizer).text == "summarize: Test news."
    other = summaries.cnn_dailymail(data=there, kind="causal-lm")
    assert other.render(other.test[0], tokenizer).text == "Test news.\n\nTL;DR:"
    with pytest.raises(TaskError, match="kind='encoder' writes no summary"):
        summaries.cnn_dailymail(data=there, kind="encoder")


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Pictures.new("RGB", (8, 6), (255, 0, 0)).save(path)


def test_textvqa_opens_its_pictures_when_asked_and_knows_all_ten_answers(hub, files, tmp_path):
    answers = ["stop"] * 6 + ["go"] * 4
    entry = {"question": "What is written?", "image_id": "0a", "answers": answers, "question_id": 5}
    there = files(
        {
            "TextVQA_0.5.1_train.json": {"data": [entry]},
            "TextVQA_0.5.1_val.json": {"data": [{**entry, "question_id": 6}]},
        }
    )
    picture(there / "train_images" / "0a.jpg")
    row = {"question": "What is written?", "answers": answers}
    features = Features(
        {
            "question": TEXT,
            "answers": datasets.List(TEXT),
            "question_id": Value("int32"),
            "image": Image(),
        }
    )
    pixels = Pictures.new("RGB", (8, 6), (255, 0, 0))
    hub("train", [row | {"question_id": 5, "image": pixels}], features)
    hubs = hub("validation", [row | {"question_id": 6, "image": pixels}], features)
    for task in (textvqa.textvqa(data=str(there)), textvqa.textvqa(data=str(hubs))):
        (example,) = task.test
        assert (example.id, example.answer) == ("6", "stop")
        assert len(example.accepted) == 10
        assert example.images[0].size == (8, 6)
        assert example.images[0].getpixel((3, 3))[0] > 240
        assert task.score(["Stop!"], task.test) == {"vqa_accuracy": 1}


def test_a_missing_picture_is_an_error_before_anything_runs(files):
    entry = {"question": "?", "image_id": "0a", "answers": ["x"], "question_id": 5}
    there = files({"TextVQA_0.5.1_train.json": {"data": [entry]}})
    with pytest.raises(TaskError, match=r"picture of question 5 is missing: .*0a.jpg"):
        textvqa.textvqa(data=str(there))
