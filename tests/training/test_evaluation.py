"""How predictions are made and scored: against brute force, the published rules, and figures by hand."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vflair_core import Example, Task
from vflair_core.errors import TaskError
from vflair_core.tasks.metrics import chance_of, exact_match, standard_score, token_f1
from vflair_core.tasks.preprocessor import Preprocessor
from vflair_core.tasks.question_answering import LONGEST, N_BEST, best_answers
from vflair_core.tasks.tokenization import InputFormat, input_format_of
from vflair_core.tasks.tokenizer_training import train_tokenizer
from vflair_core.testing import tiny_model
from vflair_core.training.evaluation import evaluate

TEXTS = ["Ada wrote the first program.", "Bob said noon.", "Where is she?"]
TOKENIZER = train_tokenizer(TEXTS * 3, 320)
PAIRED = train_tokenizer(TEXTS * 3, 320, pairs=True)
PASSAGE = "Ada was at home. Then she went to the old harbour, and there she stayed until noon."


# -- spans -------------------------------------------------------------------------------------------------


def windows(max_length=24):
    questions = [Example("Where?", pair=PASSAGE), Example("Who?", pair="Bob said noon.")]
    reading = InputFormat("question-answering", stride=4)
    return Preprocessor(PAIRED, reading, max_length).batch(questions).rows


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.booleans())
def test_the_best_span_is_the_one_that_trying_all_of_them_finds(seed, or_none):
    rows = windows()
    width = max(len(row.ids) for row in rows)
    generator = torch.Generator().manual_seed(seed)
    starts, ends = torch.randn(2, len(rows), width, generator=generator)
    expected = []
    for number in (0, 1):
        of_one = [n for n, row in enumerate(rows) if row.number == number]
        best, text = -math.inf, ""
        if or_none:
            best = min(float(starts[n, 0] + ends[n, 0]) for n in of_one)
        for n in of_one:
            inside = [t for t, which in enumerate(rows[n].sequences) if which == 1]
            assert len(inside) <= N_BEST  # then trying the best ones is trying all
            for first, last in itertools.product(inside, inside):
                score = float(starts[n, first]) + float(ends[n, last])
                if first <= last < first + LONGEST and score > best:
                    best = score
                    left, right = rows[n].offsets[first][0], rows[n].offsets[last][1]
                    text = rows[n].example.pair[left:right]
        expected.append(text)
    assert best_answers(rows, starts, ends, or_none=or_none) == expected


def test_a_span_is_at_most_so_long():
    (row,) = [row for row in windows(200) if row.number == 0]
    inside = [n for n, which in enumerate(row.sequences) if which == 1]
    starts = ends = torch.zeros(1, len(row.ids))
    starts[0, inside[0]] = 2.0
    ends = ends.clone()
    ends[0, inside[LONGEST]] = 9.0  # one token too far
    ends[0, inside[LONGEST - 1]] = 8.0
    ends[0, inside[0]] = 1.0
    right = row.offsets[inside[LONGEST - 1]][1]
    assert best_answers([row], starts, ends) == [PASSAGE[:right]]


def test_one_window_with_an_answer_suffices_and_the_null_score_is_the_lowest():
    rows = [row for row in windows() if row.number == 0]
    starts = ends = torch.zeros(len(rows), max(len(row.ids) for row in rows))
    starts = starts.clone()
    starts[:, 0] = torch.arange(len(rows)).float()  # nulls 0, 1, 2, …: the lowest counts
    place = rows[1].sequences.index(1)
    starts[1, place] = 0.5
    ends = torch.full_like(starts, -5.0)
    ends[:, 0] = 0.0
    ends[1, place] = 0.0
    left, right = rows[1].offsets[place]
    assert best_answers(rows, starts, ends) == [PASSAGE[left:right]]
    starts[1, place] = -0.5
    assert best_answers(rows, starts, ends) == [""]


# -- choices and answers ---------------------------------------------------------------------------------------


def by_hand(model, prompt, answer):
    """Sum of log-probabilities of the tokens of `answer` after `prompt`, one forward for each token."""
    ids = TOKENIZER(prompt)["input_ids"]
    total, tokens = 0.0, TOKENIZER(f" {answer}", add_special_tokens=False)["input_ids"]
    for token in tokens:
        logits = model(torch.tensor([ids])).logits[0, -1]
        total += float(logits.log_softmax(-1)[token])
        ids = [*ids, token]
    return total, total / len(tokens)


def test_choices_are_ranked_by_the_log_likelihood_of_their_tokens():
    model = tiny_model("llama", vocab_size=len(TOKENIZER))
    options = ("Ada", "the first program", "noon", "Where is she said Bob")
    prompts = ["Who wrote?", "What did Bob say", "Where is"]
    examples = [Example(prompt, choices=options, label=1) for prompt in prompts]
    said = []
    task = Task(
        "t", kind="causal-lm", train=examples, test=examples,
        score=lambda predictions, _: said.extend(predictions) or {"x": 0.0},
    )  # fmt: skip
    found = evaluate(
        model, task, Preprocessor(TOKENIZER, input_format_of(task, model)), batch_size=2
    )
    with torch.no_grad():
        scores = [[by_hand(model, prompt, option) for option in options] for prompt in prompts]
    sums = [max(range(4), key=lambda n: row[n][0]) for row in scores]
    means = [max(range(4), key=lambda n: row[n][1]) for row in scores]
    assert said[:3] == sums
    per_token = sum(mean == 1 for mean in means) / 3
    assert found.metrics["accuracy_per_token"] == pytest.approx(per_token)


def test_answers_are_what_greedy_decoding_writes_and_perplexity_is_of_the_answer_alone():
    model = tiny_model("llama", vocab_size=len(TOKENIZER))
    examples = [Example("Who wrote?", answer="Ada"), Example("Where is she and who", answer="noon")]
    said = []
    task = Task(
        "t", kind="causal-lm", train=examples, test=examples, generation={"max_new_tokens": 5},
        score=lambda predictions, rows: said.extend(predictions) or {"x": 0.5},
    )  # fmt: skip
    found = evaluate(
        model, task, Preprocessor(TOKENIZER, input_format_of(task, model)), batch_size=2
    )
    total = count = 0.0
    for example, text in zip(examples, said, strict=False):
        ids = TOKENIZER(example.text)["input_ids"]
        start = len(ids)
        with torch.no_grad():
            for _ in range(5):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] == TOKENIZER.eos_token_id:
                    break
            assert text == TOKENIZER.decode(ids[start:], skip_special_tokens=True)
            told = TOKENIZER(f" {example.answer}", add_special_tokens=False)["input_ids"]
            row = [*ids[:start], *told, TOKENIZER.eos_token_id]
            logits = model(torch.tensor([row])).logits[0].log_softmax(-1)
            total -= sum(float(logits[n - 1, row[n]]) for n in range(start, len(row)))
            count += len(row) - start
    assert found.metrics["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert list(found.metrics) == ["x", "perplexity", "loss"]


# -- measures and chance -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "wanted"),
    [("", "A"), ("35", "3.5"), ("5", "-5"), ("C#", "C++"), ("the", "a"), ("Us", "US"), ("?", "!")],
)
def test_answers_are_compared_as_they_are_written(said, wanted):
    assert exact_match(said, wanted) == exact_match(wanted, said) == 0.0
    assert token_f1(said, wanted) == 0.0
    for text in (said, wanted):
        assert exact_match(f" {text}\n", text) == token_f1(f" {text}\n", text) == 1.0


def test_words_are_those_between_spaces():
    assert token_f1("the old big harbour", "old harbour") == pytest.approx(2 * 2 / (4 + 2))
    assert token_f1("harbour!", "harbour") == token_f1("harbour", "") == 0.0
    assert token_f1("", "") == exact_match("", "") == 1.0


def task(kind, **more):
    rows = [Example("a", label=0, pair="b", answer="c")]
    return Task("t", kind=kind, labels=("x", "y"), train=rows, test=rows, **more)


def test_the_best_accepted_answer_counts():
    scores = standard_score(
        task("question-answering"), ["old harbour", ""], [("inn", "harbour"), ()]
    )
    assert scores["exact_match"] == 0.5
    assert scores["token_f1"] == pytest.approx((2 / 3 + 1) / 2)


def test_chance_is_the_best_answer_that_is_the_same_for_all():
    assert chance_of(task("classification"), [0, 1, 1, 1]) == 0.75
    assert chance_of(task("regression"), [0.0, 1.0]) == 0.0
    assert chance_of(task("question-answering"), [("inn",), (), (), ("bar",)]) == 0.5
    choosing = Task(
        "t", kind="causal-lm", train=[Example("a", choices=("b", "c"), label=0)],
        test=[Example("a", choices=("b", "c"), label=0)],
    )  # fmt: skip
    assert chance_of(choosing, [(0, 4), (1, 4), (2, 4), (3, 4)]) == 0.25
    assert chance_of(choosing, [(0, 4), (0, 4), (0, 4), (3, 4)]) == 0.75
    telling = Task("t", kind="causal-lm", train=[Example("a")], test=[Example("a")])
    assert chance_of(telling, [torch.tensor([9, 5, 5, 7, -100]), torch.tensor([5, 5, 8])]) == 0.6


def test_chance_is_on_the_tasks_own_scale():
    def recall_of_y(predictions, _):
        return {"recall": sum(predictions) / len(predictions)}

    scored = task("classification", score=recall_of_y)
    assert chance_of(scored, [1, 1, 0]) == 1.0


def test_a_task_that_gives_nan_for_a_constant_has_no_chance():
    scored = task("classification", score=lambda *_: {"matthews": math.nan})
    assert chance_of(scored, [1, 1, 0]) == 0.0


def test_r2_and_error_by_hand():
    scores = standard_score(task("regression"), [1.0, 2.0, 4.0], [1.0, 2.0, 3.0])
    assert scores == {
        "r2": pytest.approx(1 - (1 / 3) / (2 / 3)),
        "mean_squared_error": pytest.approx(1 / 3),
    }


# -- rows that are made when they are asked for -------------------------------------------------------------


class Lazy:
    """A long table that notes which rows were read."""

    def __init__(self, count, bad=None):
        self.count, self.bad, self.read = count, bad, []

    def __len__(self):
        return self.count

    def __getitem__(self, row):
        if not 0 <= row < self.count:
            raise IndexError(row)
        self.read.append(row)
        return Example(f"row {row}", label=None if row == self.bad else row % 2)


def lazy_task(train, test):
    return Task("big", kind="classification", labels=("even", "odd"), train=train, test=test)


def test_making_a_task_of_a_table_reads_no_row():
    train, test = Lazy(10_000_000), Lazy(4)
    lazy_task(train, test)
    assert train.read == test.read == []


def test_a_bad_row_of_a_table_is_found_when_it_is_used_with_split_and_row():
    made = lazy_task(Lazy(100, bad=70), Lazy(4))
    assert made.row("train", 69).label == 1
    with pytest.raises(TaskError, match=r"Task 'big', train row 70: label None is not an index"):
        made.row("train", 70)


def test_a_run_reads_the_rows_it_trains_on_and_a_sample_for_the_noise_seed():
    from vflair_core.experiments.context import HASHED, RunContext, noise_seed
    from vflair_core.experiments.experiment import Experiment, Model, Named
    from vflair_core.training.fine_tuning import Train

    train = Lazy(1_000_000)
    made = lazy_task(train, Lazy(4))
    experiment = Experiment(Named("big"), Model("m"), train=Train(steps=3, batch_size=2))
    setting = SimpleNamespace(experiment=experiment, task=made)
    batches = list(RunContext.batches(setting))
    assert [len(batch) for batch in batches] == [2, 2, 2]
    assert len(set(train.read)) == 6
    train.read.clear()
    noise_seed(0, made)
    assert len(train.read) == HASHED
    assert max(train.read) > 990_000


@pytest.mark.parametrize(
    ("kind", "example", "words"),
    [
        ("regression", Example("a"), "label None is not a number"),
        ("question-answering", Example("a"), "there is no passage"),
        ("seq2seq", Example("a"), "neither an answer nor a choice"),
        ("image-text", Example("a", answer="b"), "there is no picture"),
        ("causal-lm", Example("a", choices=("b", "c"), label=2), "not an index into its choices"),
    ],
)
def test_what_an_example_lacks_for_its_kind_is_said(kind, example, words):
    good = {"regression": Example("a", label=1.0)}.get(
        kind, Example("a", pair="b", answer="c", images=("p",))
    )
    with pytest.raises(TaskError, match=f"test row 1: .*{words}"):
        Task("t", kind=kind, train=[good], test=[good, example])
