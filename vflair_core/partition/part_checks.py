"""What a part of a checkpoint must hold to be restored, seen before anything is changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from vflair_core.errors import CheckpointError, alternatives, shown
from vflair_core.partition.fingerprint import differences

# What optimizers keep of each weight; those of Adam with all, or with nothing before the first step.
_ADAM = ("step", "exp_avg", "exp_avg_sq")
_KEPT = {"SGD": ("momentum_buffer",), "Adam": _ADAM, "AdamW": _ADAM}


def check_part(
    facts: Mapping[str, Any], fingerprint: str, optimizer: Any, path: Any, *, party: str
) -> None:
    """See that a part is of a run of this party, with this model, cut and optimizer.

    Raises:
        CheckpointError: It is not.
    """
    if facts.get("party") != party:
        raise CheckpointError(
            f"{path} is the part of {shown(facts.get('party'))}, and {party}'s was due: the files are in each other's place."
        )
    if facts.get("fingerprint") != fingerprint:
        raise CheckpointError(
            f"{path} is of another model or cut: it has {differences(facts.get('fingerprint'), fingerprint)} now. "
            "Load the model, revision and partition it was trained with."
        )
    now = type(optimizer).__name__
    if facts.get("optimizer") != now:
        raise CheckpointError(
            f"{path} was saved with the optimizer {facts.get('optimizer')}, and now it is {now}. Go on with "
            "the same Train(optimizer=...)."
        )


def check_counts(facts: Mapping[str, Any], path: Any, *names: str) -> None:
    """See that each of these facts is a whole number >= 0.

    Raises:
        CheckpointError: One is not.
    """
    for name in names:
        if type(facts.get(name)) is not int or facts[name] < 0:
            raise CheckpointError(f"{path} says {name} {shown(facts.get(name))}: no whole number.")


def check_alike(
    present: Mapping[str, Tensor], saved: Mapping[str, Tensor], path: Any, what: str = "weights"
) -> None:
    """See that what was saved has the names, shapes and types of what is present.

    Raises:
        CheckpointError: It has not.
    """
    here, there = _outsides(present), _outsides(saved)
    wrong = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    if wrong:
        first = wrong[0]
        raise CheckpointError(
            f"{path} does not fit this model: {len(wrong)} {what} are on one side only or of another shape or type, "
            f"{', '.join(wrong[:4])} among them ({first}: saved {there.get(first)}, here {here.get(first)}). Build the "
            "model, its cut and its adapters as they were."
        )


def _outsides(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: f"{tuple(t.shape)} {t.dtype}" for name, t in tensors.items()}


def check_optimizer(optimizer: Optimizer | None, saved: Mapping[str, Tensor], path: Any) -> None:
    """See that the `saved` state, by the number of the weight and the name of the value, fits the optimizer's weights.

    Raises:
        CheckpointError: It does not.
    """
    groups = optimizer.param_groups if optimizer is not None else []
    weights = [(weight, group) for group in groups for weight in group["params"]]
    found: dict[int, set[str]] = {}
    for name, tensor in saved.items():
        number, _, key = name.partition("/")
        index = int(number) if number.isdecimal() and len(number) < 10 else len(weights)
        if index >= len(weights):
            raise CheckpointError(
                f"{path} has {shown(name)} of an optimizer that has {len(weights)} weights here. Train what was trained."
            )
        weight = weights[index][0]
        if key != "step" and (tensor.shape != weight.shape or not tensor.is_floating_point()):
            raise CheckpointError(
                f"{path} has {key} of weight {index} as {tuple(tensor.shape)} {tensor.dtype}; the weight is "
                f"{tuple(weight.shape)} {weight.dtype}. Train what was trained, in the same order."
            )
        if key == "step" and (tensor.numel() != 1 or not bool(tensor >= 0)):
            raise CheckpointError(f"{path} has a step of weight {index} that is none.")
        found.setdefault(index, set()).add(key)
    for index, keys in found.items():
        kept = _KEPT.get(type(optimizer).__name__)
        due = {*(kept or keys), *(["max_exp_avg_sq"] if weights[index][1].get("amsgrad") else [])}
        if keys != due:
            raise CheckpointError(
                f"{path} keeps {', '.join(sorted(keys))} of weight {index}, and {type(optimizer).__name__} keeps "
                f"{', '.join(sorted(due))}."
            )


def check_random(tensors: Mapping[str, Tensor], generators: Mapping[str, str], path: Any) -> None:
    """See that the states of `generators`, each name with its device, are such that a generator can take them.

    Raises:
        CheckpointError: One is missing, or is none.
    """
    for name, device in generators.items():
        if name not in tensors:
            there = [key for key in tensors if key.startswith("random/")]
            raise CheckpointError(
                f"{path} has no state of the generator {name}.{alternatives(name, there, label='There are')}"
            )
        attempt(
            partial(torch.Generator(device).set_state, tensors[name]),
            f"{path}: {name} is not the state of a generator",
        )


def attempt(do: Callable[[], Any], otherwise: str) -> None:
    """Do what code that is not ours may refuse in any way.

    Raises:
        CheckpointError: It did.
    """
    try:
        do()
    except Exception as error:  # a defense's or torch's own
        raise CheckpointError(f"{otherwise}: {type(error).__name__}: {error}") from error
