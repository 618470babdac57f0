"""Public text in the form of a task's examples: what crosses where nothing private may."""

from __future__ import annotations

from typing import Any

from vflair_core.tasks.task import Example, Task

SIDE = 64  # pixels of a blank picture


def public_examples(task: Task, count: int) -> list[Example]:
    """Return up to `count` examples made of the task's public text, to be read without its prompt.

    Labels are 0, answers the text itself, pictures blank; nothing should be learnt from them.
    """
    return [_standin(task.kind, text) for text in task.public[:count]]


def _standin(kind: str, text: str) -> Example:
    match kind:
        case "classification":
            return Example(text, label=0)
        case "regression":
            return Example(text, label=0.0)
        case "seq2seq":
            return Example(text, answer=text)
        case "image-text":
            return Example(text, answer=text, images=(_blank(),))
        case _:
            return Example(text)


def _blank() -> Any:
    import numpy as np

    return np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
