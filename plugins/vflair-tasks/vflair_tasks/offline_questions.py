"""Tasks about planted records that need no network: a question, a written answer, a choice, a summary, a picture.

Private is what is planted: the name in a question, and name, address and number in a record.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

from attrs import evolve, frozen

from vflair_core import Example, Task, TaskCard, TaskError, TaskKind
from vflair_tasks.corpus import with_public_text
from vflair_tasks.offering import offer
from vflair_tasks.offline import LICENCE, RECORDS
from vflair_tasks.prompts import Prompt
from vflair_tasks.records import Record, records

QUESTIONS = {
    "email": "Which mail address does {name} have?",
    "phone": "Which phone number does {name} have?",
    "account": "Which account does {name} have?",
}
PROMPT = Prompt("Note: {pair}\nQuestion: {text}\nAnswer:")
SHAPES = ("circle", "square", "triangle", "bar")
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 160, 60),
    "blue": (40, 70, 220),
    "yellow": (240, 210, 40),
    "black": (10, 10, 10),
    "purple": (140, 50, 170),
}


@frozen
class Size:
    """How many examples, and how much public text.

    Args:
        seed: Draws all.
        train_examples: To learn from.
        test_examples: To be judged on.
        public_characters: Length of the public text.
    """

    seed: int = 0
    train_examples: int = 800
    test_examples: int = 200
    public_characters: int = 600_000


@frozen
class Unanswered:
    """How many questions have no answer.

    Args:
        unanswerable: Share of the questions that ask for the number that the record does not have.
    """

    unanswerable: float = 0.25


@frozen
class Canvas:
    """How large the pictures are.

    Args:
        pixels: Width and height.
    """

    pixels: int = 32


def _task(
    name: str, kind: TaskKind, size: Size, make: Callable[[Record], Example], **more: Any
) -> Task:
    for option in ("train_examples", "test_examples"):
        if getattr(size, option) < 1:
            raise TaskError(
                f"{option}={getattr(size, option)} leaves a split empty. Ask for 1 example or more."
            )
    drawn = records(size.train_examples + size.test_examples, seed=size.seed)
    examples = [evolve(make(r), id=f"record-{n}") for n, r in enumerate(drawn)]
    task = Task(
        name=name,
        kind=kind,
        train=examples[: size.train_examples],
        test=examples[size.train_examples :],
        source=RECORDS,
        licence=LICENCE,
        **more,
    )
    return with_public_text(task, characters=size.public_characters)


def _asked(record: Record, what: str) -> Example:
    """Return a question on a record, and its answer if the record has one."""
    before, _, after = QUESTIONS[what].partition("{name}")
    span = record.planted.get(what)
    return Example(
        text=before + record["name"] + after,
        private=((len(before), len(before) + len(record["name"])),),
        pair=record.text,
        private_pair=tuple(record.planted.values()),
        span=span,
        answer=record[what] if span else "",
    )


def _questions(size: Size, unanswered: Unanswered) -> Task:
    if not 0 <= unanswered.unanswerable < 1:
        raise TaskError(
            f"unanswerable={unanswered.unanswerable} is not a share of the questions. It must be 0 or more "
            "and less than 1; try 0.25."
        )
    rng = random.Random(f"record-questions {size.seed}")

    def make(record: Record) -> Example:
        if rng.random() < unanswered.unanswerable:
            return _asked(record, "account" if record.number == "phone" else "phone")
        return _asked(record, rng.choice(["email", record.number]))

    return _task(
        "record-questions", "question-answering", size, make, no_answer=unanswered.unanswerable > 0
    )


def _answers(size: Size) -> Task:
    rng = random.Random(f"record-answers {size.seed}")

    def make(record: Record) -> Example:
        return evolve(_asked(record, rng.choice(["email", record.number])), span=None)

    return _task(
        "record-answers", "causal-lm", size, make, render=PROMPT, generation={"max_new_tokens": 32}
    )


def _choices(size: Size) -> Task:
    rng = random.Random(f"record-choices {size.seed}")

    def make(record: Record) -> Example:
        user, _, host = record["email"].partition("@")
        letters = [place for place, sign in enumerate(user) if sign.isalpha()]
        wrong: set[str] = set()
        while len(wrong) < 3:
            place = rng.choice(letters)
            letter = rng.choice("abcdefghijklmnopqrstuvwxyz".replace(user[place], ""))
            wrong.add(f"{user[:place]}{letter}{user[place + 1 :]}@{host}")
        choices = [record["email"], *sorted(wrong)]
        rng.shuffle(choices)
        example = evolve(_asked(record, "email"), span=None, answer=None, choices=tuple(choices))
        return evolve(example, label=choices.index(record["email"]))

    return _task("record-choices", "causal-lm", size, make, render=PROMPT)


def _summaries(size: Size) -> Task:
    def make(record: Record) -> Example:
        summary = f"{record['name']}, {record['email']}, {record[record.number]}"
        return Example(record.text, private=tuple(record.planted.values()), answer=summary)

    return _task("record-summaries", "seq2seq", size, make, generation={"max_new_tokens": 48})


def _drawings(size: Size, canvas: Canvas) -> Task:
    if canvas.pixels < 8:
        raise TaskError(f"pixels={canvas.pixels} is too small to draw in. Give 8 or more.")
    rng, drawn = random.Random(f"record-drawings {size.seed}"), itertools.count()

    def make(record: Record) -> Example:
        colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
        left, top = rng.randrange(canvas.pixels // 4), rng.randrange(canvas.pixels // 4)
        # Corners of even and of odd coordinates: no picture is in both splits.
        of_test = next(drawn) >= size.train_examples
        left = left ^ 1 if (left + top) % 2 != of_test else left
        name = record["name"]
        return Example(
            text=f"What did {name} draw?",
            private=((len("What did "), len("What did ") + len(name)),),
            answer=f"a {colour} {shape}",
            images=(draw(shape, colour, pixels=canvas.pixels, corner=(left, top)),),
        )

    return _task(
        "record-drawings", "image-text", size, make,
        render=Prompt("Question: {text}\nAnswer:"), generation={"max_new_tokens": 16},
    )  # fmt: skip


def draw(shape: str, colour: str, *, pixels: int, corner: Sequence[int]) -> Any:
    """Return a white picture of `pixels` × `pixels` with one shape, the corner of whose box is given.

    Raises:
        TaskError: Pillow is not installed.
    """
    try:
        from PIL import Image, ImageDraw
    except ImportError as error:
        raise TaskError(
            "Pictures need pillow, which is not installed: pip install vflair-tasks[images]."
        ) from error
    picture = Image.new("RGB", (pixels, pixels), (255, 255, 255))
    pen = ImageDraw.Draw(picture)
    left, top = corner
    right, bottom = left + pixels // 2, top + pixels // 2
    fill = COLOURS[colour]
    if shape == "circle":
        pen.ellipse((left, top, right, bottom), fill=fill)
    elif shape == "square":
        pen.rectangle((left, top, right, bottom), fill=fill)
    elif shape == "bar":
        pen.rectangle((left, top, right, top + pixels // 8), fill=fill)
    else:
        pen.polygon([(left, bottom), (right, bottom), ((left + right) // 2, top)], fill=fill)
    return picture


def _card(kind: TaskKind, metric: str) -> TaskCard:
    sizes = {"train": Size().train_examples, "test": Size().test_examples}
    return TaskCard(kind=kind, metric=metric, source=RECORDS, licence=LICENCE, sizes=sizes)


record_questions = offer(
    _questions,
    "record-questions",
    _card("question-answering", "exact_match"),
    "Find the address or number of a person in a record, or that it is not there.",
    Size,
    Unanswered,
)
record_answers = offer(
    _answers,
    "record-answers",
    _card("causal-lm", "exact_match"),
    "Write the address or number of a person in a record.",
    Size,
)
record_choices = offer(
    _choices,
    "record-choices",
    _card("causal-lm", "accuracy"),
    "Choose the address of a person in a record among four; three have another letter.",
    Size,
)
record_summaries = offer(
    _summaries,
    "record-summaries",
    _card("seq2seq", "exact_match"),
    "Sum a record up as name, address and number.",
    Size,
)
record_drawings = offer(
    _drawings,
    "record-drawings",
    _card("image-text", "exact_match"),
    "Say which shape of which colour is on a picture that somebody drew.",
    Size,
    Canvas,
)
