"""What a user says of their own data: which column is what. All that can be refused without the data is refused here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

from attrs import frozen

from vflair_core import TaskError, TaskKind, did_you_mean
from vflair_tasks.offering import Asking

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


@frozen
class Columns:
    """What is where.

    Args:
        data: A file, a folder with a file or folder for each split, or a name on the hub.
        kind: What is learnt.
        text: Column of what the model reads first.
        pair: Column of what it reads second: a passage, a second sentence.
        label: Column of the class, of the number, or of the index of the right choice.
        answer: Column of the expected text; of a question, a text of the passage or SQuAD's answers.
        choices: Column of lists of possible answers.
        image: Column of pictures or of paths of pictures, from the folder of the file.
        labels: Names of the classes; none takes the distinct values of the train rows.
        private: Columns that are secret among `text` and `pair`; none means both.
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
    private: Sequence[str] = ()
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
        """Columns whose cells may be empty: a question may have no answer."""
        return (self.answer,) if self.kind == "question-answering" else ()

    @property
    def needed(self) -> dict[str, str]:
        """What there is a column for, and the column."""
        return {word: getattr(self, word) for word in WORDS if getattr(self, word)}


def check(columns: Columns, asking: Asking) -> None:
    """See that the columns are those that the kind reads, and that no option would do nothing.

    Raises:
        TaskError: They are not, or one would.
    """
    if columns.kind not in KINDS:
        hint = did_you_mean(columns.kind, KINDS)
        raise TaskError(f"kind={columns.kind!r} is unknown. Possible: {', '.join(KINDS)}.{hint}")
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
