"""What is secret within a text: what regular expressions match, and spans that a column gives."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from vflair_core import Span, TaskError


def compiled(patterns: Sequence[str]) -> list[re.Pattern[str]]:
    """Return regular expressions ready for use.

    Raises:
        TaskError: One does not parse, or matches nothing at all.
    """
    if isinstance(patterns, str):
        raise TaskError(f"private_patterns is a list: give [{patterns!r}].")
    made = []
    for pattern in patterns:
        try:
            made.append(re.compile(pattern))
        except re.error as error:
            raise TaskError(
                f"private_patterns: {pattern!r} is no regular expression ({error}). Put a backslash before signs that "
                "are meant as such; in TOML write patterns in single quotes."
            ) from error
        if made[-1].fullmatch(""):
            raise TaskError(
                f"private_patterns: {pattern!r} matches nothing at all, also between two letters. Let it match one sign "
                "or more."
            )
    return made


def matched(patterns: Iterable[re.Pattern[str]], text: str) -> list[Span]:
    """Return where the patterns match; of one with groups, where its groups do."""
    spans = []
    for pattern in patterns:
        groups = range(1, pattern.groups + 1) if pattern.groups else (0,)
        for match in pattern.finditer(text):
            spans += [match.span(group) for group in groups if match[group]]
    return spans


def joined(spans: Iterable[Span]) -> tuple[Span, ...]:
    """Return spans in the order of the text, those that overlap as one."""
    found: list[Span] = []
    for start, end in sorted(spans):
        if found and start < found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return tuple(found)


def spans_fault(spans: Sequence[Sequence[int]] | None, text: str) -> str:
    """Say why spans are none of a text."""
    for start, end in spans or ():
        if not 0 <= start < end <= len(text):
            return (
                f"[{start}, {end}] is no span of a text of {len(text)} characters: it goes from the first to the one "
                "behind the last, and 0 <= start < end"
            )
    return ""
