"""How written answers of the user's own data are compared: as they are, unless the user says otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vflair_core import Example, Score, TaskError, alternatives
from vflair_tasks.formulas import boxed, same_formula
from vflair_tasks.mathematics import last_number
from vflair_tasks.metrics import texts
from vflair_tasks.squad import score as squad_score


def last_number_score(predictions: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
    """Return how often the last number that is said is that of an accepted answer."""
    right = 0
    for said, example in zip(predictions, examples, strict=True):
        number = last_number(said)
        right += number is not None and number in map(last_number, example.accepted)
    return {"exact_match_of_last_number": right / len(examples)}


def boxed_formula_score(
    predictions: Sequence[str], examples: Sequence[Example]
) -> dict[str, float]:
    r"""Return how often the last formula in ``\boxed{}`` is that of an accepted answer, as MATH compares them."""
    right = 0
    for said, example in zip(predictions, examples, strict=True):
        right += any(same_formula(boxed(said), boxed(answer)) for answer in example.accepted)
    return {"exact_match_of_boxed_formula": right / len(examples)}


METRICS: Mapping[str, Score | None] = {
    "exact_match": None,  # the core's
    "squad": squad_score,
    "last_number": last_number_score,
    "boxed_formula": boxed_formula_score,
    "rougeL": texts("rougeL"),
    "bleu": texts("bleu"),
}


def check_metric(metric: str, kind: str, *, written: bool) -> None:
    """See that a metric is known and compares something.

    Raises:
        TaskError: It does not.
    """
    if metric not in METRICS:
        raise TaskError(f"metric={metric!r} is unknown.{alternatives(metric, METRICS)}")
    if METRICS[metric] is not None and not written:
        raise TaskError(
            f"metric={metric!r} compares written answers, and kind {kind!r} has none here. Leave it out."
        )


def comparison_fault(metric: str, answers: Sequence[str]) -> str:
    """Say why an answer cannot be compared so: nothing that is said would be right."""
    if metric == "last_number" and all(last_number(answer) is None for answer in answers):
        return f"there is no number in the answer {answers[0][:40]!r}, and metric = 'last_number' compares numbers"
    if metric == "boxed_formula" and all(boxed(answer) is None for answer in answers):
        return rf"there is no \boxed{{}} in the answer {answers[0][:40]!r}, and metric = 'boxed_formula' compares it"
    return ""
