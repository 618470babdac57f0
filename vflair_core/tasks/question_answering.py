"""The answer to a question: the best span over all windows of its passage, or none.

Follows the procedure published with SQuAD 2.0 (Rajpurkar et al., arXiv 1806.03822) for BERT: the best `N_BEST` starts and
ends of each window are paired, spans are at most `LONGEST` tokens, and the likeliest wins; "no answer" competes
with the score of the first position, the lowest over all windows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from torch import Tensor

from vflair_core.tasks.spans import Replaced
from vflair_core.tasks.task import Span
from vflair_core.tasks.token_rows import TokenRow

N_BEST = 20
LONGEST = 30  # tokens


def best_answers(
    rows: Sequence[TokenRow],
    starts: Tensor,
    ends: Tensor,
    *,
    or_none: bool = True,
    passages: Sequence[str | None] = (),
) -> list[str]:
    """Return the answer to each question, in order; ``""`` where "no answer" scores at least as high.

    Args:
        rows: Windows; those of one example follow each other.
        starts: (windows, T) scores that the answer begins at a position.
        ends: (windows, T) scores that it ends there.
        or_none: Whether a question may have no answer; if not, the best span is taken whatever its score.
        passages: Of each question, as they were before a defense replaced their words: what is said is taken from there.
    """
    windows = [
        (row, start[: len(row.ids)].tolist(), end[: len(row.ids)].tolist())
        for row, start, end in zip(rows, starts, ends, strict=True)
    ]
    grouped = itertools.groupby(windows, key=lambda window: window[0].number)
    return [
        _best(list(group), passages[number] if passages else None, or_none=or_none)
        for number, group in grouped
    ]


def _best(
    windows: Sequence[tuple[TokenRow, list[float], list[float]]],
    passage: str | None,
    *,
    or_none: bool,
) -> str:
    # The null score of a passage in several windows is the lowest: one window with an answer suffices.
    none = min(start[0] + end[0] for _, start, end in windows)
    best, text = none if or_none else -math.inf, ""
    for row, start, end in windows:
        inside = [n for n, sequence in enumerate(row.sequences) if sequence == 1]
        likely_ends = sorted(inside, key=lambda n: -end[n])[:N_BEST]
        for first in sorted(inside, key=lambda n: -start[n])[:N_BEST]:
            for last in likely_ends:
                if first <= last < first + LONGEST and start[first] + end[last] > best:
                    best = start[first] + end[last]
                    found = (row.offsets[first][0], row.offsets[last][1])
                    text = _said(row.example.pair or "", found, passage)
    return text


def _said(sent: str, span: Span, passage: str | None) -> str:
    """The words of `span`, in the passage before its words were replaced if they were."""
    if passage is None or not isinstance(sent, Replaced):
        return sent[slice(*span)]
    before = sent.back(span)
    return "" if before is None else passage[slice(*before)]
