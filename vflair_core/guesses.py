"""Guesses as files: what the worker found, and what it has found so far."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vflair_core.attack import Guess

SO_FAR = "so-far.safetensors"


def leave_so_far(folder: Path, tokens: Tensor, place: str) -> None:
    """Leave a guess in the making, `place` its attack's number and the pass; whoever reads finds all of it."""
    part = folder / f"{SO_FAR}.part"
    save_file({"tokens": tokens.contiguous()}, part, metadata={"place": place})
    part.replace(folder / SO_FAR)


def take_so_far(folder: Path) -> tuple[int, str, Tensor] | None:
    """Take away the guess in the making that lies in the folder: its attack's number, the pass, tokens."""
    taken = folder / f"{SO_FAR}.taken"
    try:
        (folder / SO_FAR).replace(taken)  # first of all: the next one may come meanwhile
    except FileNotFoundError:
        return None
    with safe_open(taken, framework="pt") as file:
        number, which = file.metadata()["place"].split()
        tokens = file.get_tensor("tokens").clone()
    return int(number), which, tokens


def write_guess(path: Path, guess: Guess, seconds: float) -> None:
    """Write a guess and the seconds it took."""
    tensors = {name: value.contiguous() for name, value in guess.tensors.items()}
    budget = {key: float(value) for key, value in dict(guess.budget or {}).items()}
    facts = json.dumps({"budget": budget, "positive": guess.positive, "seconds": seconds})
    save_file(tensors, path.with_suffix(".safetensors"), metadata={"vflair_guess": facts})


def read_guess(path: Path) -> tuple[Guess, float]:
    """Read a guess and the seconds it took."""
    with safe_open(path.with_suffix(".safetensors"), framework="pt") as file:
        facts = json.loads(file.metadata()["vflair_guess"])
        names = file.keys()
        tensors = {name: file.get_tensor(name) for name in names}
    guess = Guess(**tensors, positive=facts["positive"], budget=facts["budget"])
    return guess, facts["seconds"]
