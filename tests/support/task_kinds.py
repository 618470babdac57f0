"""A plugin with one small task of each kind, in words that a tiny model can learn in a few steps."""

from __future__ import annotations

import random
import re

import numpy as np
import torch
from attrs import define

from vflair_core import (
    Defense,
    Example,
    Guess,
    Task,
    TaskCard,
    TaskError,
    exact_match,
    hookimpl,
)

COLOURS = ("red", "green", "blue", "black")
NAMES = ("Ada", "Bob", "Cleo", "Dan", "Eve", "Finn")
PLACES = ("the harbour", "the garden", "the station", "the museum")


@hookimpl
def vflair_tasks():
    return {
        "pairs": pairs,
        "lengths": lengths,
        "passages": passages,
        "colours": colours,
        "choices": choices,
        "sentences": sentences,
        "reversed": reversed_,
        "pictures": pictures,
        "absent": absent,
    }


@hookimpl
def vflair_attacks():
    return {"shapes": shapes, "everything": everything, "nearest": nearest}


@hookimpl
def vflair_defenses():
    return {"blank": Blank}


@define(slots=False)
class Blank(Defense):
    """Put another word for every name."""

    covers = frozenset({"prompt"})

    def on_text(self, fields):
        return {key: re.sub("|".join(NAMES), "somebody", text) for key, text in fields.items()}


def nearest(smashed, mask, embeddings) -> Guess:
    """Guess the token whose embedding is nearest: exact where nothing lies before the cut."""
    return Guess(tokens=torch.where(mask, torch.cdist(smashed, embeddings).argmin(-1), -1))


def shapes(smashed, mask, returned) -> Guess:
    """Guess token 5 wherever there is a token; say how many positions were seen."""
    positions = {"positions": int(mask.sum()), "longest": smashed.shape[1]}
    return Guess(tokens=torch.full(mask.shape, 5), budget=positions)


def everything(smashed, mask, current_head, tokenizer, queries, in_domain, few_labelled) -> Guess:
    """Count what can be granted, and see that the head makes what was sent of public text."""
    text, rows = queries[0]
    ids = torch.tensor([tokenizer(text)["input_ids"]], device=current_head.device)
    end = min(ids.shape[1], len(rows), 40)
    made = current_head(ids[:, :end]) if len(rows) == ids.shape[1] else None
    apart = 0.0 if made is None else float((made[0].cpu() - rows[:end]).abs().max())
    budget = {"queries": len(queries), "labelled": len(few_labelled), "head": apart}
    budget["compared"] = made is not None
    return Guess(tokens=torch.full(mask.shape, 5), budget=budget)


def _draws(count, seed):
    draw = random.Random(seed)
    return [
        (draw.choice(NAMES), draw.choice(PLACES), draw.choice(COLOURS), draw.randrange(1, 6))
        for _ in range(count)
    ]


def _task(name, kind, make, **more) -> Task:
    public = [
        f"{n} went to {p} in a {c} coat. What colour is it? Where is {n}?"
        for n, p, c, _ in _draws(60, 3)
    ]
    train, test = (
        [make(*row) for row in _draws(count, seed)] for count, seed in ((48, 1), (12, 2))
    )
    return Task(name, kind=kind, train=train, test=test, public=public, **more)


def pairs() -> Task:
    """Whether the second text says that somebody left."""

    def make(name, place, colour, number):
        pair = f"{name} went {'out' if number % 2 else 'home'}"
        own = ((0, len(name)),)
        return Example(
            f"{name} wears {colour}", pair=pair, label=number % 2, private=own, private_pair=own
        )

    return _task("pairs", "classification", make, labels=("no", "yes"))


def lengths() -> Task:
    """How many coats a text has."""

    def make(name, place, colour, number):
        return Example(" ".join([f"{colour} coat"] * number), label=float(number))

    return _task("lengths", "regression", make)


def passages() -> Task:
    """Where somebody is, by a passage that may not say it."""

    def make(name, place, colour, number):
        passage = (
            f"The coat is {colour}. {name} is at {place} now. The coat stays {colour} all day long."
        )
        if number == 5:
            passage = passage.replace(f"{name} is at {place} now. ", "Nobody is there. ")
            return Example(f"Where is {name}?", pair=passage, answer="")
        at = passage.index(place)
        return Example(
            f"Where is {name}?",
            pair=passage,
            answer=place,
            span=(at, at + len(place)),
            private=(),
            private_pair=((at, at + len(place)),),
        )

    return _task("passages", "question-answering", make, stride=4, score=_placed)


def _placed(predictions, examples):
    """Exact match, and that of the questions that have an answer."""
    right = [exact_match(said, e.answer) for said, e in zip(predictions, examples, strict=True)]
    there = [hit for hit, example in zip(right, examples, strict=True) if example.answer]
    return {"exact_match": sum(right) / len(right), "of_answers": sum(there) / len(there)}


passages.card = TaskCard(
    kind="question-answering", metric="exact_match", sizes={"train": 48, "test": 12}, source="here"
)


def absent(*, path: str = "nowhere") -> Task:
    """A task whose data are not there."""
    raise TaskError(f"There is no table at {path}.")


def _ask(example, tokenizer):
    """Put a text into a prompt; its private spans move along."""
    front = "Read: "
    moved = tuple((start + len(front), end + len(front)) for start, end in example.private or ())
    return Example(
        f"{front}{example.text} Colour:",
        label=example.label,
        answer=example.answer,
        choices=example.choices,
        private=moved,
        images=example.images,
    )


def _coat(name, place, colour, number, **more):
    return Example(f"{name} wears {colour}.", private=((0, len(name)),), **more)


def colours(*, template: bool = True) -> Task:
    """Say the colour that a text names."""

    def make(name, place, colour, number):
        return _coat(name, place, colour, number, answer=colour)

    render = _ask if template else None
    return _task("colours", "causal-lm", make, render=render, generation={"max_new_tokens": 4})


def choices() -> Task:
    """Choose the colour that a text names."""

    def make(name, place, colour, number):
        return _coat(name, place, colour, number, choices=COLOURS, label=COLOURS.index(colour))

    return _task("choices", "causal-lm", make, render=_ask)


def sentences() -> Task:
    """Continue sentences."""

    def make(name, place, colour, number):
        return Example(f"{name} went to {place} in {colour}", private=((0, len(name)),))

    return _task("sentences", "causal-lm", make)


def reversed_() -> Task:
    """Name the coat, then the person."""

    def make(name, place, colour, number):
        return Example(
            f"{name} wears {colour}", answer=f"{colour} {name}", private=((0, len(name)),)
        )

    return _task("reversed", "seq2seq", make, generation={"max_new_tokens": 6})


def pictures() -> Task:
    """Say the colour of a picture."""
    shades = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "black": (0, 0, 0)}

    def make(name, place, colour, number):
        picture = np.zeros((20, 24, 3), dtype=np.uint8) + np.array(shades[colour], dtype=np.uint8)
        text = f"{name} wears this."
        return Example(text, answer=colour, images=(picture,), private=((0, len(name)),))

    return _task("pictures", "image-text", make, render=_ask, generation={"max_new_tokens": 3})
