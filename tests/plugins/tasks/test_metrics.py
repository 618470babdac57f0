"""Metrics against other libraries, definitions and examples worked out by hand."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from vflair_core import Example
from vflair_core.errors import TaskError
from vflair_tasks import metrics, squad, textvqa
from vflair_tasks.formulas import boxed, same_formula
from vflair_tasks.lambada import first_word
from vflair_tasks.lambada import score as lambada_score
from vflair_tasks.mathematics import gsm8k_score, math_score


def labelled(*labels):
    return [Example("text", label) for label in labels]


def answered(*answers):
    return [Example("text", answer=a) for a in answers]


def test_matthews_correlation_is_the_one_by_hand():
    # TP 3, TN 2, FP 1, FN 1: (3·2 − 1·1) / √(4·4·3·3) = 5/12.
    truth, guess = (1, 1, 1, 1, 0, 0, 0), [1, 1, 1, 0, 0, 0, 1]
    found = metrics.matthews(guess, labelled(*truth))
    assert found["matthews"] == pytest.approx(5 / 12)
    assert found["matthews_from_0"] == pytest.approx(5 / 12)
    assert found["accuracy"] == pytest.approx(5 / 7)
    inverse = metrics.matthews([1 - g for g in guess], labelled(*truth))
    assert inverse["matthews"] == pytest.approx(-5 / 12)
    assert inverse["matthews_from_0"] == 0


def test_f1_is_that_of_class_1_by_hand():
    # TP 2, FP 1, FN 2: F1 = 4 / (4 + 1 + 2); 5 of 8 are right.
    found = metrics.accuracy_and_f1([1, 1, 0, 0, 1, 0, 0, 0], labelled(1, 1, 1, 1, 0, 0, 0, 0))
    assert found["f1"] == pytest.approx(4 / 7)
    assert found["accuracy"] == pytest.approx(5 / 8)
    assert found["accuracy_and_f1"] == pytest.approx((4 / 7 + 5 / 8) / 2)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=30))
def test_correlations_are_scipys_with_ties_too(pairs):
    truth, guess = (np.array(side, dtype=float) for side in zip(*pairs, strict=True))
    found = metrics.correlations(list(guess), labelled(*truth))
    if truth.std() and guess.std():
        assert found["pearson"] == pytest.approx(stats.pearsonr(truth, guess).statistic)
        assert found["spearman"] == pytest.approx(stats.spearmanr(truth, guess).statistic)
    else:
        assert found["pearson"] == found["spearman"] == 0
    assert found["mean_squared_error"] == pytest.approx(((truth - guess) ** 2).mean())


def test_rouge_is_f1_by_hand():
    # 3 of 4 said words and 3 of 6 wanted ones agree: F1 = 2·3/10; bigrams: 1 of 3 and 1 of 5; longest run in order: 3.
    found = metrics.texts("rougeL")(["the cat lay down"], answered("the cat was found lying down"))
    assert found["rouge1"] == pytest.approx(0.6)
    assert found["rouge2"] == pytest.approx(2 * 1 / 8)
    assert found["rougeL"] == pytest.approx(0.6)
    assert next(iter(found)) == "rougeL"


def test_bleu_is_the_product_of_precisions_and_brevity_by_hand():
    # 4-word prefix of a 5-word text: all n-grams right, brevity exp(1 − 5/4).
    assert metrics.bleu(["one two three four"], ["one two three four five"]) == pytest.approx(
        np.exp(-0.25)
    )
    assert metrics.bleu(["one two three four five"], ["one two three four five"]) == pytest.approx(
        1
    )


def test_exact_match_ignores_space_around_and_nothing_else():
    found = metrics.texts("exact_match")([" yes\n", "Yes", "no"], answered("yes", "yes", "no"))
    assert found["exact_match"] == pytest.approx(2 / 3)


def test_codebleu_without_a_grammar_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tree_sitter_python", None)
    with pytest.raises(
        TaskError, match=r"CodeBLEU of 'python'.*tree-sitter-python.*metric = \"bleu\""
    ):
        metrics.codebleu("python")


def test_codebleu_is_1_for_the_same_program_and_less_for_another():
    pytest.importorskip("tree_sitter_python", reason="the extra [code] is not installed")
    program = "def f(x):\n    return x + 1\n"
    score = metrics.codebleu("python")
    assert score([program], answered(program))["codebleu"] == pytest.approx(1)
    assert score(["def f(x):\n    print(x)\n"], answered(program))["codebleu"] < 0.9


# Worked out after the official evaluation of SQuAD: words without case, articles and punctuation.
@pytest.mark.parametrize(
    ("said", "answers", "f1", "exact"),
    [
        ("The Denver Broncos", ("Denver Broncos",), 1, 1),
        ("denver broncos!", ("Carolina", "Denver Broncos"), 1, 1),
        ("in Santa Clara", ("Santa Clara, California", "Levi's Stadium"), 2 * 2 / 6, 0),
        ("gold", ("Santa Clara",), 0, 0),
        ("", ("",), 1, 1),
        ("gold", ("",), 0, 0),
        ("", ("gold",), 0, 0),
        ("the the", ("gold",), 0, 0),
        ("", ("A",), 0, 0),
        ("A", ("a",), 0, 0),
        ("?", ("!",), 0, 0),
        ("A", ("A",), 1, 1),
    ],
)
def test_squad_scores_are_the_official_ones(said, answers, f1, exact):
    found = squad.score([said], [Example("Q?", answers=answers)])
    assert found["f1"] == pytest.approx(f1)
    assert found["exact_match"] == exact


def test_squad_tells_questions_with_and_without_an_answer_apart():
    examples = [
        Example("Q?", answer="red", answers=("red",)),
        Example("Q?", answer=""),
        Example("Q?", answer=""),
    ]
    found = squad.score(["red car", "", "blue"], examples)
    assert found["f1_answerable"] == pytest.approx(2 / 3)
    assert found["exact_match_unanswerable"] == pytest.approx(0.5)
    assert found["f1"] == pytest.approx((2 / 3 + 1 + 0) / 3)


# The table of the paper: min(1, n/3) over subsets of nine of ten annotators, averaged.
@pytest.mark.parametrize(
    ("agreeing", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)]
)
def test_vqa_accuracy_is_the_published_one(agreeing, accuracy):
    answers = ["stop"] * agreeing + ["go"] * (10 - agreeing)
    assert textvqa.vqa_accuracy("Stop.", answers) == pytest.approx(accuracy)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The Stop!", "stop"),
        ("two dogs", "2 dogs"),
        ("1,000.50", "1000.50"),
        ("don't", "dont"),
        ("U.S. mail", "us mail"),
        ("coca-cola", "coca cola"),
        ("$5 / day", "$5 day"),
        ("10:45", "10:45"),
        ("A", "A"),
        ("?!", "?!"),
    ],
)
def test_vqa_answers_are_made_plain(text, plain):
    assert textvqa.plain(text) == plain


@pytest.mark.parametrize(
    ("said", "strict", "last"),
    [
        ("5 + 7 = 12 #### 1,234", 1, 1),
        ("#### 1234.00", 1, 1),
        ("#### 1234.", 1, 1),
        ("So it is $1,234.", 0, 1),
        ("#### 12 and 1234", 0, 1),
        ("#### -1234", 0, 0),
        ("#### .", 0, 0),
        ("234-1,234", 0, 1),
        ("1 -1,234", 0, 0),
        ("x-1,234", 0, 1),
        ("so -1,234", 0, 0),
        ("so .1,234", 0, 0),
        ("no idea", 0, 0),
    ],
)
def test_gsm8k_compares_the_number_behind_the_marks(said, strict, last):
    found = gsm8k_score([said], answered("Adds up.\n#### 1,234"))
    assert (found["exact_match"], found["exact_match_of_last_number"]) == (strict, last)


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"so $\boxed{12}$.", "12"),
        (r"\boxed{1} or \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\fbox{x}", "x"),
        (r"$\boxed 5$ apples", "5"),
        (r"\boxed{open", None),
        ("none", None),
    ],
)
def test_the_last_box_is_found_with_its_braces(text, inside):
    assert boxed(text) == inside


# From the description of the equivalence in the appendix of the paper, and its limits.
@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        (r"\frac12", r"\frac{1}{2}", True),
        (r"\dfrac{1}{2}", r"\tfrac12", True),
        (r"\frac{a}b", r"\frac{a}{b}", True),
        (r"\frac{\frac12}3", r"\frac{\frac{1}{2}}{3}", True),
        ("1/2", r"\frac{1}{2}", True),
        ("-1/2", r"-\frac{1}{2}", True),
        ("0.5", r"\frac{1}{2}", True),
        (".5", "0.5", True),
        ("1.5", "1.5", True),
        (r"\sqrt3", r"\sqrt{3}", True),
        ("x = 5", "5", True),
        (r"5 \text{ cm}", "5", True),
        (r"90^\circ", "90", True),
        (r"50\%", "50", True),
        (r"\$5", "5", True),
        (r"\left( 1, 2 \right)", "(1,2)", True),
        ("2/4", "1/2", False),
        (r"\frac{1}{3}", r"\frac{1}{2}", False),
        (r"\text{Evelyn}", r"\text{Briana}", False),
        ("12", "1", False),
        ("-5", "5", False),
        ("", "5", False),
        ("", r"\%", False),
        (r"\$", r"\%", False),
    ],
)
def test_formulas_are_the_same_if_only_their_notation_differs(left, right, same):
    assert same_formula(left, right) is same
    assert same_formula(right, left) is same


def test_a_solution_without_a_box_is_wrong():
    truth = answered(r"It is $\boxed{\frac12}$.", r"\boxed{3}")
    found = math_score([r"\boxed{1/2}", "3"], truth)
    assert found == {"exact_match": 0.5}
    assert math_score(["3"], answered("no box")) == {"exact_match": 0}


@pytest.mark.parametrize(
    ("said", "word"),
    [
        (" signs, he said", "signs"),
        ("“Gabriel”", "Gabriel"),
        ("don't go", "don't"),
        ("co-op", "co-op"),
        ("...", "."),
        ("", ""),
    ],
)
def test_the_first_word_is_whole(said, word):
    assert first_word(said) == word


def test_lambada_wants_the_whole_word():
    assert lambada_score(["sign", " signs.", "Signs"], answered("signs", "signs", "signs")) == {
        "accuracy": pytest.approx(1 / 3)
    }
