"""Turn a builder and its option records into a function that is offered as a task, with its card."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import attrs
from attrs import NOTHING, evolve, frozen

from vflair_core import Task, TaskCard, TaskError
from vflair_tasks.prompts import Prompt, shots_from
from vflair_tasks.rows import View


@frozen
class Asking:
    """How examples are put to a model that writes.

    Args:
        prompt: Template with column names in braces; None takes the data set's own.
        shots: Train examples that are shown first; they are not learnt from and nobody attacks them.
        chat: Whether to use the tokenizer's chat template.
        system: What the chat says first.
    """

    prompt: str | None = None
    shots: int = 0
    chat: bool = False
    system: str = ""


def offer(
    build: Callable[..., Task],
    name: str,
    card: TaskCard,
    about: str,
    *records: type,
    without: Sequence[str] = (),
) -> Callable[..., Task]:
    """Return a function whose options are the fields of `records`; it calls `build` with one of each.

    Its docstring explains each option as the docstring of its record does.

    Args:
        build: Takes one of each record.
        name: Of the task.
        card: Its attribute `card`.
        about: Its docstring.
        records: Classes of attrs whose fields are the options.
        without: Fields that are no option of this task.
    """
    fields: dict[type, list[Any]] = {}
    taken = set(without)
    for record in records:  # of two fields of one name the first is the option
        fields[record] = [f for f in attrs.fields(record) if f.name not in taken]
        taken |= {f.name for f in fields[record]}

    def task(**options: Any) -> Task:
        known = {f.name for own in fields.values() for f in own}
        for key in options:
            if key not in known:
                raise TypeError(f"{name} has no option {key!r}; it has {', '.join(sorted(known))}")
        return build(
            *(
                record(**{f.name: options[f.name] for f in own if f.name in options})
                for record, own in fields.items()
            )
        )

    task.__name__ = task.__qualname__ = name.replace("-", "_")
    task.__doc__ = f"{about}\n\nArgs:\n" + "\n".join(
        f"    {f.name}: {explained(record)[f.name]}" for record, own in fields.items() for f in own
    )
    task.card = card  # type: ignore[attr-defined]
    task.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(
                f.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if f.default is NOTHING else _default(f),
                annotation=f.type,
            )
            for own in fields.values()
            for f in own
        ]
    )
    return task


def explained(record: type) -> dict[str, str]:
    """Return what the docstring of a record says of each of its fields, as one line."""
    _, _, rest = (inspect.getdoc(record) or "").partition("Args:\n")
    said: dict[str, list[str]] = {}
    for line in rest.split("\n\n", 1)[0].splitlines():
        name, _, text = line.strip().partition(": ")
        if line.startswith("    ") and not line.startswith("     "):
            said[name] = [text]
        else:
            said[next(reversed(said))].append(line.strip())
    return {name: " ".join(lines) for name, lines in said.items()}


def _default(field: Any) -> Any:
    return field.default.factory() if hasattr(field.default, "factory") else field.default


def asked(task: Task, prompt: Prompt, asking: Asking, *, seed: int) -> Task:
    """Return the task with its examples in a prompt: the data set's own, or the user's, with shots from train."""
    if asking.system and not asking.chat:
        raise TaskError("system says something in a chat, and this is none. Set chat = true.")
    if asking.prompt is not None:
        prompt = evolve(prompt, template=asking.prompt, alone=None)
    shots, rest = shots_from(task.train, asking.shots, seed=seed)
    train = View(task.train, rest) if shots else task.train
    prompt = evolve(prompt, shots=shots, chat=asking.chat, system=asking.system)
    facts = {**task.facts, "shots": [shot.id for shot in shots]}
    return evolve(task, train=train, render=prompt, facts=facts)
