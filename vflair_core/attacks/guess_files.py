"""Guesses as files: what the worker found, and what it has found so far."""

from __future__ import annotations

import json
from pathlib import Path

from attrs import define, field, frozen
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vflair_core.attacks.attack import Guess

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


@define
class Progression:
    """What an attack believed at some points of its way, spread evenly over the calls of `add`.

    Each point is (forwards, seconds, tokens); of many every second one is dropped, again and again.
    """

    most: int = 16
    points: list[tuple[float, float, Tensor]] = field(factory=list)
    _calls: int = 0
    _stride: int = 1

    def add(self, forwards: float, seconds: float, tokens: Tensor) -> None:
        """Keep what is believed after so many forwards and seconds, if it is the turn of this one."""
        self._calls += 1
        if self._calls % self._stride:
            return
        self.points.append((forwards, seconds, tokens.clone()))
        if len(self.points) == self.most:
            self.points, self._stride = self.points[1::2], 2 * self._stride


@frozen(eq=False)
class TimedGuess:
    """What an attack guessed in the end, the seconds it took, its course if it told any, and what it used and read."""

    guess: Guess
    seconds: float
    course: Progression
    used: frozenset[str] = frozenset()  # of what it was told of the defense, what it asked
    read: frozenset[str] = frozenset()  # seams that it read (`reading.py`)


def write_guess(path: Path, found: TimedGuess) -> None:
    """Write what an attack found."""
    guess, points = found.guess, found.course.points
    tensors = {name: value.cpu().contiguous() for name, value in guess.tensors.items()}
    tensors |= {f"course {n}": tokens.contiguous() for n, (_, _, tokens) in enumerate(points)}
    facts = {
        "budget": {key: float(value) for key, value in dict(guess.budget or {}).items()},
        "positive": guess.positive,
        "seconds": found.seconds,
        "course": [point[:2] for point in points],
        "used": sorted(found.used),
        "read": sorted(found.read),
    }
    metadata = {"vflair_guess": json.dumps(facts)}
    save_file(tensors, path.with_suffix(".safetensors"), metadata=metadata)


def read_guess(path: Path) -> TimedGuess:
    """Read what an attack found."""
    with safe_open(path.with_suffix(".safetensors"), framework="pt") as file:
        facts = json.loads(file.metadata()["vflair_guess"])
        names = file.keys()
        tensors = {name: file.get_tensor(name) for name in names}
    points = [(*spent, tensors.pop(f"course {n}")) for n, spent in enumerate(facts["course"])]
    guess = Guess(**tensors, positive=facts["positive"], budget=facts["budget"])
    course = Progression(points=points)
    used, read = (frozenset(facts[name]) for name in ("used", "read"))
    return TimedGuess(guess, facts["seconds"], course, used, read)
