"""TextVQA: questions on the text in a photograph. Photograph and question are private, the template is not.

Singh et al., CVPR 2019, arXiv 1904.08920. Test is the validation set; the answers of the test set are not public. The score is
VQA accuracy (Antol et al., ICCV 2015, arXiv 1505.00468). Differs from its evaluator: apostrophes are dropped where that has
a list of contractions to put them in ("dont" and "don't" are one word in both).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vflair_core import Example, Task, TaskCard, TaskError
from vflair_tasks.assembly import Choice, Side, assemble, open_sides
from vflair_tasks.offering import Asking, asked, offer
from vflair_tasks.prompts import Prompt
from vflair_tasks.rows import Make
from vflair_tasks.tables import Original, Row, Source

LICENCE = "CC-BY-4.0"
_NUMBERS = "none zero one two three four five six seven eight nine ten".split()
_DIGITS = dict(zip(_NUMBERS, "0 0 1 2 3 4 5 6 7 8 9 10".split(), strict=True))
_ARTICLES = {"a", "an", "the"}
_DROPPED = re.compile(r"(?<=\d),(?=\d)|['’]|\.(?!\d)")
_SPACED = re.compile(r"[;/\[\]\"{}()=+\\_><@`,?!-]")


def score(predictions: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
    """Return the mean VQA accuracy."""
    pairs = zip(predictions, examples, strict=True)
    return {"vqa_accuracy": sum(vqa_accuracy(said, e.answers) for said, e in pairs) / len(examples)}


def vqa_accuracy(said: str, answers: Sequence[str]) -> float:
    """Return min(1, n / 3), n of the other annotators agreeing, averaged over leaving out each annotator in turn."""
    said = plain(said)
    agrees = [plain(answer) == said for answer in answers]
    if len(answers) == 1:
        return float(agrees[0])
    total = sum(agrees)
    return sum(min(1.0, (total - own) / 3) for own in agrees) / len(answers)


def plain(text: str) -> str:
    """Return an answer in lower case, without articles and punctuation, number words as digits.

    One of which that leaves nothing stays as it is written: no answer is never the same as an answer.
    """
    bare = _SPACED.sub(" ", _DROPPED.sub("", text.lower()))
    words = [_DIGITS.get(word, word) for word in bare.split()]
    return " ".join(word for word in words if word not in _ARTICLES) or text.strip()


def _textvqa(choice: Choice, asking: Asking) -> Task:
    source = Source("lmms-lab/textvqa", original=Original(_files, _questions))
    task = assemble(
        open_sides(
            source,
            choice,
            test=("validation", "val"),
            columns=[("question",), ("answers",), ("image",)],
        ),
        _maker,
        choice,
        name="textvqa",
        kind="image-text",
        score=score,
        generation={"max_new_tokens": 16},
        source=source.hub,
        licence=LICENCE,
    )
    prompt = Prompt("Question: {question}\nAnswer:", names={"question": "text"})
    return asked(task, prompt, asking, seed=choice.seed)


def _files(folder: Path, names: Sequence[str]) -> list[Path]:
    """Find ``TextVQA_0.5.1_train.json``."""
    return sorted(path for name in names for path in folder.glob(f"TextVQA_*_{name}.json"))[:1]


def _questions(files: Sequence[str]) -> Iterator[Row]:
    """Read questions and the paths of their pictures, which lie in ``train_images`` (also those of validation)."""
    for file in files:
        path = Path(file)
        for entry in json.loads(path.read_text(encoding="utf-8"))["data"]:
            picture = path.parent / "train_images" / f"{entry['image_id']}.jpg"
            if not picture.is_file():
                raise TaskError(
                    f"{path}: the picture of question {entry['question_id']} is missing: {picture}. Unpack the "
                    "images beside the json file."
                )
            yield {
                "question": entry["question"],
                "answers": entry["answers"],
                "question_id": entry["question_id"],
                "image": str(picture),
            }


def _maker(side: Side) -> Make:
    question, answers, image = side.columns

    def make(row: Mapping[str, Any], number: int) -> Example:
        given = tuple(row[answers])
        return Example(
            text=row[question],
            answer=Counter(given).most_common(1)[0][0],
            answers=given,
            images=(as_picture(row[image]),),
            id=str(row.get("question_id", f"{side.name}-{number}")),
        )

    return make


def as_picture(picture: Any) -> Any:
    """Return a picture in colours, given as one or as the path of its file."""
    try:
        from PIL import Image
    except ImportError as error:
        raise TaskError(
            "Pictures need pillow, which is not installed: pip install vflair-tasks[images]."
        ) from error
    if isinstance(picture, str):
        with Image.open(picture) as opened:
            return opened.convert("RGB")
    return picture.convert("RGB")


textvqa = offer(
    _textvqa,
    "textvqa",
    TaskCard(
        kind="image-text",
        metric="vqa_accuracy",
        source="lmms-lab/textvqa",
        licence=LICENCE,
        columns={"image": "images", "question": "text", "answers": "answers"},
        sizes={"train": 34602, "test": 5000},
    ),
    "TextVQA: answer a question on the text in a photograph. Both are private.",
    Choice,
    Asking,
    without=["test_share", "shots"],
)
