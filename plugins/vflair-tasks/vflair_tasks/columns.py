"""What a user says of their own data: which column is what. All that can be refused without the data is refused here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

from attrs import frozen

from vflair_core import TaskError, TaskKind, alternatives
from vflair_tasks.cells import Use, use_of
from vflair_tasks.comparison import check_metric
from vflair_tasks.delimited import Writing, check_writing
from vflair_tasks.offering import Asking
from vflair_tasks.secret_spans import compiled

KINDS = get_args(TaskKind)
NEEDED: Mapping[str, tuple[str, ...]] = {
    "causal-lm": ("text",),
    "classification": ("text", "label"),
    "regression": ("text", "label"),
    "question-answering": ("text", "pair", "answer"),
    "seq2seq": ("text", "answer"),
    "image-text": ("text", "answer", "image"),
}
WORDS = ("text", "pair", "label", "answer", "choices", "image")
SPANS = ("private_spans", "private_pair_spans")
ROLES = {
    "pair": "text",
    "private_spans": "spans",
    "private_pair_spans": "spans",
}  # of others: their own


@frozen
class Columns:
    """What is where.

    Args:
        data: A file (csv, tsv, txt, jsonl, json, parquet), a folder with a file or folder for each split, or a name on
            the hub.
        kind: What is learnt: causal-lm, classification, regression, question-answering, seq2seq or image-text.
        text: Column of what the model reads first. In this and the next five a path goes into lists and objects:
            ``messages[-1].content``.
        pair: Column of what it reads second: a passage, a second sentence.
        label: Column of the class, of the number, or of the index of the right choice.
        answer: Column of the expected text, or of lists of texts that all are right; of a question, a text of the passage or
            SQuAD's answers.
        choices: Column of lists of possible answers.
        image: Column of pictures or of paths of pictures, from the folder of the file.
        labels: Names of the classes; none takes the distinct values of the train rows.
        metric: How written answers are compared: ``exact_match`` (as they are, but for space around), ``squad`` (without case,
            punctuation and articles), ``last_number``, ``boxed_formula``, ``rougeL`` or ``bleu``.
        private: Columns that are secret among `text` and `pair`; none means both, in full.
        private_patterns: Regular expressions: what they match in the columns of `private` is secret there, and nothing else;
            of one with groups, what the groups match.
        private_spans: Column of spans of `text` that are secret, and nothing else: [[start, end], …] in characters from 0,
            `end` behind the last; in csv written as json.
        private_pair_spans: The same of `pair`.
        join: What is put between the items where a cell of `text` or `pair` is a list of texts; none refuses lists.
        separator: Between the cells of csv and tsv; none takes the comma and the tab.
        quoting: Of csv and tsv: ``double`` (a quote in a quoted cell is written twice), ``backslash`` (behind a backslash) or
            ``none`` (a quote is a sign like others); none given takes double for csv and none for tsv.
        encoding: Of csv, tsv, txt, json and jsonl.
        empty: ``error`` or ``drop`` for rows with an empty cell; what is dropped is counted in the result.
        config: Configuration on the hub.
        train_split: Name of the train split.
        test_split: Name of the test split; where there is none, `test_share` of the rows is the test.
    """

    data: str
    kind: str
    text: str
    pair: str = ""
    label: str = ""
    answer: str = ""
    choices: str = ""
    image: str = ""
    labels: Sequence[str] = ()
    metric: str = "exact_match"
    private: Sequence[str] = ()
    private_patterns: Sequence[str] = ()
    private_spans: str = ""
    private_pair_spans: str = ""
    join: str | None = None
    separator: str = ""
    quoting: str = ""
    encoding: str = "utf-8"
    empty: str = "error"
    config: str = ""
    train_split: str = "train"
    test_split: str = "test"

    @property
    def folder(self) -> Path:
        """The folder that paths of pictures start from."""
        place = Path(self.data).expanduser()
        return place.parent if place.is_file() else place

    @property
    def may_be_empty(self) -> tuple[str, ...]:
        """Columns whose cells may be empty: a question may have no answer, a text no secret."""
        spans = (self.private_spans, self.private_pair_spans)
        return (*spans, self.answer) if self.kind == "question-answering" else spans

    @property
    def needed(self) -> dict[str, str]:
        """What there is a column for, and the column."""
        return {word: getattr(self, word) for word in WORDS if getattr(self, word)}

    @property
    def used(self) -> dict[str, str]:
        """The same with the columns of spans."""
        spans = {word: getattr(self, word) for word in SPANS if getattr(self, word)}
        return self.needed | spans

    @property
    def secret(self) -> tuple[str, ...]:
        """Columns that are secret, or have secrets by a pattern."""
        return tuple(self.private) or (self.text, self.pair)

    @property
    def marked(self) -> bool:
        """Whether secrets are spans, and not all of a column."""
        return bool(self.private_patterns or self.private_spans or self.private_pair_spans)

    @property
    def writing(self) -> Writing:
        """How files are written."""
        return Writing(self.separator, self.quoting, self.encoding)

    def uses(self, columns: Sequence[str], *, flat: bool = False) -> list[Use]:
        """Return what is to be read, given the columns there are and whether all cells are text."""
        found: dict[str, Use] = {}
        for word, option in self.used.items():
            role = ROLES.get(word, word)
            if word == "answer" and self.kind == "question-answering":
                role = "placed"
            elif word == "answer" and flat:
                role = "text"
            join = self.join if word in ("text", "pair") else None
            use = use_of(option, columns, role=role, join=join)
            if found.setdefault(option, use) != use:
                raise TaskError(
                    f"The column {option!r} is asked for as {found[option].role} and as {role}, and it cannot be read as both. "
                    "Copy it under another name."
                )
        return list(found.values())


def check(columns: Columns, asking: Asking) -> None:
    """See that the columns are those that the kind reads, and that no option would do nothing.

    Raises:
        TaskError: They are not, or one would.
    """
    if columns.kind not in KINDS:
        raise TaskError(f"kind={columns.kind!r} is unknown.{alternatives(columns.kind, KINDS)}")
    if columns.empty not in ("error", "drop"):
        raise TaskError(f"empty={columns.empty!r} is unknown. Possible: error, drop.")
    if columns.kind == "question-answering" and asking != Asking():
        raise TaskError("A prompt would move the passage away: question-answering takes none.")
    if columns.image and asking.shots:
        raise TaskError("Examples with pictures cannot be shown first. Set shots = 0.")
    needed = _read(columns)
    for word in needed:
        if not getattr(columns, word):
            raise TaskError(
                f'A task of kind {columns.kind!r} needs the column of its {word}: add {word} = "…" to options.'
            )
    for word in columns.needed:
        if word not in (*needed, "pair", "choices"):
            raise TaskError(
                f"A task of kind {columns.kind!r} has no use for {word} = {getattr(columns, word)!r}: it reads "
                f"{', '.join(needed)} and pair. Leave it out, or choose another kind."
            )
    if columns.labels and columns.kind != "classification":
        raise TaskError(f"labels name classes, and kind {columns.kind!r} has none. Leave them out.")
    for name in columns.private:
        if name not in (columns.text, columns.pair):
            raise TaskError(
                f"private names the column {name!r}. Possible: {columns.text}"
                f"{', ' + columns.pair if columns.pair else ''}."
            )
    if columns.private_pair_spans and not columns.pair:
        raise TaskError(
            "private_pair_spans are spans of pair, and there is no pair. Name its column."
        )
    check_metric(columns.metric, columns.kind, written=bool(columns.answer and not columns.choices))
    check_writing(columns.writing)
    compiled(columns.private_patterns)


def _read(columns: Columns) -> tuple[str, ...]:
    """Return the words whose columns the kind cannot do without, given what there is to choose or to answer."""
    needed = NEEDED[columns.kind]
    if columns.choices and columns.kind not in ("causal-lm", "seq2seq", "image-text"):
        raise TaskError(f"kind {columns.kind!r} has no choices. Leave choices out.")
    if columns.kind == "causal-lm" and columns.answer:
        needed = (*needed, "answer")
    if columns.choices:
        needed = (*(word for word in needed if word != "answer"), "label")
    return needed
