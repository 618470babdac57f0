"""Spans on their way: what remains of private ones after a text was changed, and where an answer stands then."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Self

import attrs

from vflair_core.tasks.task import Example, Span

WORD = re.compile(r"\w+|[^\w\s]")


class Replaced(str):
    """A text that a defense made word for word, which remembers the place of each word in the text before.

    It does not remember that text. `pieces` are (place before, place here), in order; what was dropped has none, and
    what stands between words belongs to none.
    """

    __slots__ = ("pieces",)
    pieces: tuple[tuple[Span, Span], ...]

    def __new__(cls, text: str, pieces: Sequence[tuple[Span, Span]]) -> Self:
        """Keep the text and where its words come from."""
        made = super().__new__(cls, text)
        made.pieces = tuple(pieces)
        return made

    def forth(self, span: Span) -> Span | None:
        """Return where the words stand here that `span` touched in the text before; None if all were dropped."""
        return _around([new for old, new in self.pieces if _meet(old, span)])

    def back(self, span: Span) -> Span | None:
        """Return where the words that `span` touches here stood in the text before."""
        return _around([old for old, new in self.pieces if _meet(new, span)])

    def after(self, earlier: str) -> Replaced:
        """Return this text with places in what `earlier` was made from, if it was."""
        if not isinstance(earlier, Replaced):
            return self
        first = [(earlier.back(old), new) for old, new in self.pieces]
        return Replaced(self, [(old, new) for old, new in first if old is not None])


def _meet(one: Span, other: Span) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def _around(spans: Sequence[Span]) -> Span | None:
    return (spans[0][0], spans[-1][1]) if spans else None


def follow(old: str, new: str, spans: Sequence[Span]) -> tuple[Span, ...]:
    """Find in `new` what remains of `spans` of `old`.

    Text that was only put between other text is found as it is. Otherwise words (runs of letters and digits,
    or single signs) of both are aligned as `difflib` does, and of a span those words remain that are in both.
    Words that follow each other with the same gap in both stay one span.
    """
    at = new.find(old)
    if at >= 0:
        return tuple((at + start, at + end) for start, end in spans)
    before, after = ([match.span() for match in WORD.finditer(text)] for text in (old, new))
    ours, theirs = [old[s:e] for s, e in before], [new[s:e] for s, e in after]
    partner: dict[int, int] = {}
    for block in SequenceMatcher(None, ours, theirs, autojunk=False).get_matching_blocks():
        partner |= {block.a + n: block.b + n for n in range(block.size)}
    found: list[Span] = []
    for start, end in spans:
        pieces: list[tuple[Span, Span]] = []  # (in old, in new)
        for number, (left, right) in enumerate(before):
            if number in partner and left < end and start < right:
                common = (max(left, start), min(right, end))
                shift = after[partner[number]][0] - left
                pieces.append((common, (common[0] + shift, common[1] + shift)))
        found += _joined(pieces, old, new)
    return tuple(found)


def _joined(pieces: Sequence[tuple[Span, Span]], old: str, new: str) -> list[Span]:
    spans: list[Span] = []
    last_old = 0
    for (start, end), (left, right) in pieces:
        if spans and spans[-1][1] <= left and old[last_old:start] == new[spans[-1][1] : left]:
            spans[-1] = (spans[-1][0], right)
        else:
            spans.append((left, right))
        last_old = end
    return spans


def changed(example: Example, text: str, pair: str | None) -> Example:
    """Return `example` with other text, its private spans and its answer's span moved to what remains of them.

    Where a defense replaced the passage word for word, the answer is where its words were, whatever they are now.
    """
    private, private_pair, span = example.private, example.private_pair, example.span
    if private is not None and text != example.text:
        private = follow(example.text, text, private)
    if pair != example.pair:
        old, new = example.pair or "", pair or ""
        if private_pair is not None:
            private_pair = follow(old, new, private_pair)
        if span is not None and isinstance(pair, Replaced):
            span = pair.forth(span)
        elif span is not None:
            remains = follow(old, new, (span,))
            span = (remains[0][0], remains[-1][1]) if remains else None
            if span is not None and span[0] >= span[1]:  # its words changed places
                span = None
    return attrs.evolve(
        example, text=text, pair=pair, private=private, private_pair=private_pair, span=span
    )


def rendered(example: Example, shown: Example) -> Example:
    """Mark what is private in `shown`, a rendering of `example`, if the rendering did not say it.

    Where all of a text is private, a template around it is not: private is what came from the example.
    """
    private, private_pair = shown.private, shown.private_pair
    if private is None and (example.private is not None or shown.text != example.text):
        private = follow(example.text, shown.text, _all(example.private, example.text))
        if example.pair is not None and shown.pair is None:
            private += follow(example.pair, shown.text, _all(example.private_pair, example.pair))
    silent = private_pair is None and shown.pair is not None
    if silent and (example.private_pair is not None or shown.pair != example.pair):
        old = example.pair or ""
        private_pair = follow(old, shown.pair or "", _all(example.private_pair, old))
    return attrs.evolve(shown, private=private, private_pair=private_pair)


def _all(spans: tuple[Span, ...] | None, text: str) -> tuple[Span, ...]:
    if spans is not None:
        return spans
    return ((0, len(text)),) if text else ()


def private_tokens(
    example: Example, offsets: Sequence[Span], sequences: Sequence[int | None]
) -> list[bool]:
    """Say of each token whether it touches a private span; never one of no text (`sequences` None).

    Args:
        example: As it was sent.
        offsets: Characters of each token in its own text.
        sequences: 0 for tokens of `text`, 1 for tokens of `pair`, None for all others.
    """
    spans = (
        _all(example.private, example.text),
        _all(example.private_pair, example.pair or ""),
    )
    return [
        sequence is not None
        and any(start < right and left < end for left, right in spans[sequence])
        for (start, end), sequence in zip(offsets, sequences, strict=True)
    ]
