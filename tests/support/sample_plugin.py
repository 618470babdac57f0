"""A third-party plugin in one file: an attack, a defense and a task."""

from __future__ import annotations

import random

import torch
from attrs import define, frozen

from vflair_core import Defense, Example, Guess, Task, hookimpl
from vflair_core.defenses.mechanism import Mechanism

WORDS = [
    "river",
    "stone",
    "lamp",
    "paper",
    "cloud",
    "engine",
    "winter",
    "garden",
    "copper",
    "signal",
    "harbour",
    "window",
]


@hookimpl
def vflair_attacks():
    return {
        "first-row": FirstRow,
        "takes-and-idles": takes_and_idles,
        "peek": peek,
        "last-label": last_label,
        "ask-all": ask_all,
        "which-weights": which_weights,
        "places": places,
    }


@hookimpl
def vflair_defenses():
    return {"shift": Shift}


@hookimpl
def vflair_tasks():
    return {"words": words, "two-words": two_words}


@frozen
class FirstRow:
    """Guess one token everywhere: the one whose embedding is nearest to the first row."""

    def __call__(self, smashed, mask, embeddings) -> Guess:
        nearest = torch.cdist(smashed[:, 0], embeddings).argmin(-1)
        return Guess(tokens=torch.where(mask, nearest[:, None], -1))


def peek(smashed, mask) -> Guess:
    """Cheat: look for the truth in this process and in the folder it runs in."""
    import gc
    import sys

    from vflair_core.experiments.grading.truth import Truth

    truths = [thing for thing in gc.get_objects() if type(thing) is Truth]
    modules = [
        m for name, m in sys.modules.items() if name.endswith(("sample_plugin", "vflair_tasks"))
    ]
    if truths:
        longest = mask.shape[1]
        rows = [
            torch.nn.functional.pad(t, (0, longest - len(t)), value=-1) for t in truths[0].tokens
        ]
        return Guess(tokens=torch.stack(rows))
    return Guess(tokens=torch.full(mask.shape, len(modules)))


def last_label(smashed, mask) -> Guess:
    """Guess class 0 for everyone."""
    return Guess(labels=torch.zeros(len(smashed), dtype=torch.long))


def which_weights(smashed, head, tail, pretrained_head, pretrained_tail) -> Guess:
    """Say whether head and tail are others than the pretrained ones."""
    ids = torch.arange(3, 9, device=head.device)[None]
    states = torch.ones(1, 6, smashed.shape[-1], device=tail.device)
    moved = {
        "head": not torch.equal(head(ids), pretrained_head(ids)),
        "tail": not torch.equal(tail(states), pretrained_tail(states)),
    }
    return Guess(tokens=torch.zeros(smashed.shape[:2], dtype=torch.long), budget=moved)


def places(
    smashed, hidden_grad, mask, embeddings, head, tail, body, pretrained_model, generator, progress
) -> Guess:
    """Say of each thing whether it is on the CPU, and guess where the head is."""
    models = {
        "head": head.device,
        "tail": tail.device,
        "body": next(body.parameters()).device,
        "model": pretrained_model.device,
    }
    tensors = {"smashed": smashed, "gradient": hidden_grad, "mask": mask, "embeddings": embeddings}
    devices = models | {name: tensor.device for name, tensor in tensors.items()}
    devices |= {"generator": generator.device}
    tokens = torch.zeros(mask.shape, dtype=torch.long, device=head.device)
    progress(1, 1, 0.0, tokens, 1)
    here = {name: float(device.type == "cpu") for name, device in devices.items()}
    return Guess(tokens=tokens, budget=here)


def ask_all(
    smashed,
    body,
    tokenizer,
    pretrained_model,
    in_domain,
    few_labelled,
    queries,
    public_texts,
    rounds,
) -> Guess:
    """Take everything that can be granted and count it."""
    text, rows = queries[0]
    ids = tokenizer(text, truncation=True, max_length=12)["input_ids"]
    counts = {
        "body": sum(p.numel() for p in body.parameters()),
        "model": sum(p.numel() for p in pretrained_model.parameters()),
        "odd_rows_of_query": abs(len(rows) - len(ids)),
        "in_domain": len(in_domain),
        "labelled": len(few_labelled),
        "public": len(public_texts),
        "rounds": len(rounds),
    }
    return Guess(tokens=torch.zeros(smashed.shape[:2], dtype=torch.long), budget=counts)


@define(slots=False)
class Shift(Defense):
    """Add a constant to all smashed data."""

    by: float = 1.0
    covers = frozenset({"prompt"})

    def on_smashed(self, smashed, exchange):
        return smashed + self.by

    def mechanism(self):
        return Shifted(self.by)


@frozen
class Shifted(Mechanism):
    by: float

    def expected(self, hidden):
        return hidden + self.by


def _texts(count, seed):
    chooser = random.Random(seed)
    return [" ".join(chooser.choices(WORDS, k=6)) for _ in range(count)]


def words(*, train: int = 24) -> Task:
    """Random words."""
    return Task(
        name="words",
        kind="causal-lm",
        train=[Example(text, private=((0, 5),)) for text in _texts(train, 1)],
        test=[Example(text) for text in _texts(8, 2)],
        public=_texts(60, 3),
    )


def two_words() -> Task:
    """Which of two words a text holds more often."""
    rows = [(t, int(t.count("river") > t.count("stone"))) for t in _texts(200, 4)]
    examples = [Example(text, label=label) for text, label in rows]
    return Task(
        name="two-words",
        kind="classification",
        labels=("stone", "river"),
        train=examples[:150],
        test=examples[150:],
        public=_texts(60, 3),
    )


def takes_and_idles(mask, mechanism=None) -> Guess:
    """Take what is told of the defense, and guess the same whatever it is."""
    return Guess(tokens=torch.where(mask, 5, -1))
