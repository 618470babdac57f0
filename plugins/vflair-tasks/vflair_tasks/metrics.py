"""Scores that are reported the way the data set's authors do, by known libraries where there are any.

Each returns what `Task.score` wants: a function of predictions and examples whose first metric lies in [0, 1].
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from vflair_core import Example, TaskError

Metrics = dict[str, float]


def accuracy(predictions: Sequence[int], examples: Sequence[Example]) -> Metrics:
    """Share of right labels."""
    right = sum(p == e.label for p, e in zip(predictions, examples, strict=True))
    return {"accuracy": right / len(examples)}


def accuracy_and_f1(predictions: Sequence[int], examples: Sequence[Example]) -> Metrics:
    """Mean of accuracy and F1 of class 1, then each: GLUE's for MRPC and QQP (scikit-learn)."""
    from sklearn.metrics import f1_score

    found = accuracy(predictions, examples)["accuracy"]
    f1 = float(f1_score([e.label for e in examples], predictions, zero_division=0))
    return {"accuracy_and_f1": (found + f1) / 2, "accuracy": found, "f1": f1}


def matthews(predictions: Sequence[int], examples: Sequence[Example]) -> Metrics:
    """Matthews' correlation, below 0 counted as 0, then as it is: GLUE's for CoLA (scikit-learn)."""
    from sklearn.metrics import matthews_corrcoef

    value = float(matthews_corrcoef([e.label for e in examples], predictions))
    return {
        "matthews_from_0": max(value, 0.0),
        "matthews": value,
        **accuracy(predictions, examples),
    }


def correlations(predictions: Sequence[float], examples: Sequence[Example]) -> Metrics:
    """Mean of Pearson's and Spearman's correlation, below 0 counted as 0, then each: GLUE's for STS-B.

    A correlation with a constant is not defined and given as 0.
    """
    import numpy as np

    truth = np.array([e.label for e in examples], dtype=float)
    guess = np.array(predictions, dtype=float)
    pearson, spearman = _pearson(truth, guess), _pearson(_ranks(truth), _ranks(guess))
    return {
        "pearson_and_spearman_from_0": max((pearson + spearman) / 2, 0.0),
        "pearson": pearson,
        "spearman": spearman,
        "mean_squared_error": float(np.mean((truth - guess) ** 2)),
    }


def _pearson(left: Any, right: Any) -> float:
    import numpy as np

    if len(left) < 2 or not left.std() or not right.std():
        return 0.0
    return float(np.corrcoef(left, right)[0, 1])


def _ranks(values: Any) -> Any:
    """Ranks from 1; equal values share the mean of theirs."""
    import numpy as np

    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def texts(*first: str) -> Callable[[Sequence[str], Sequence[Example]], Metrics]:
    """Return a score of generated texts whose metrics begin with those named.

    ROUGE-1, -2 and -L are F1 with stemming (rouge-score), the best over the accepted answers, averaged; BLEU is of
    the corpus, in [0, 1], against the first accepted answer (sacrebleu); exact match ignores space around the text.
    """

    def score(predictions: Sequence[str], examples: Sequence[Example]) -> Metrics:
        answers = [example.accepted for example in examples]
        found = rouge(predictions, answers)
        found["bleu"] = bleu(predictions, [accepted[0] for accepted in answers])
        found["exact_match"] = exact_match(predictions, answers)
        return {name: found[name] for name in first} | found

    return score


def rouge(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> Metrics:
    """ROUGE-1, -2 and -L, F1 (Lin, "ROUGE", 2004), by Google's rouge-score with stemming."""
    from rouge_score.rouge_scorer import RougeScorer

    names = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(list(names), use_stemmer=True)
    totals = dict.fromkeys(names, 0.0)
    for prediction, accepted in zip(predictions, answers, strict=True):
        found = scorer.score_multi(list(accepted), prediction)
        for name in names:
            totals[name] += float(found[name].fmeasure)
    return {name: total / len(predictions) for name, total in totals.items()}


def bleu(predictions: Sequence[str], answers: Sequence[str]) -> float:
    """Corpus BLEU in [0, 1] (Papineni et al., ACL 2002), by sacrebleu with its default tokens."""
    import sacrebleu

    return min(float(sacrebleu.corpus_bleu(list(predictions), [list(answers)]).score) / 100, 1.0)


def exact_match(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    """Share of texts that are one of the accepted, but for space around them."""
    pairs = zip(predictions, answers, strict=True)
    right = sum(p.strip() in {a.strip() for a in accepted} for p, accepted in pairs)
    return right / len(predictions)


def codebleu(language: str) -> Callable[[Sequence[str], Sequence[Example]], Metrics]:
    """Return CodeBLEU in one language (Ren et al., arXiv 2009.10297), by the codebleu library.

    Raises:
        TaskError: The library or its grammar of the language is not installed or does not fit.
    """
    try:
        from codebleu import calc_codebleu

        calc_codebleu(["x = 1"], ["x = 1"], lang=language)
    except (ImportError, TypeError, AttributeError, AssertionError, NotImplementedError) as error:
        raise TaskError(
            f"CodeBLEU of {language!r} cannot be computed here: {error}. Install codebleu and "
            f"tree-sitter-{language} of a matching version (pip install vflair-tasks[code]), or set "
            'metric = "bleu".'
        ) from error

    def score(predictions: Sequence[str], examples: Sequence[Example]) -> Metrics:
        answers = [[accepted] for accepted in (example.accepted[0] for example in examples)]
        found = calc_codebleu(answers, list(predictions), lang=language)
        return {"codebleu": float(found["codebleu"])} | texts("bleu")(predictions, examples)

    return score


def shared_words(prediction: Sequence[str], answer: Sequence[str]) -> float:
    """F1 of two bags of words; 1 where both are empty, 0 where one is."""
    if not prediction or not answer:
        return float(list(prediction) == list(answer))
    common = sum((Counter(prediction) & Counter(answer)).values())
    return 2 * common / (len(prediction) + len(answer))
