"""Attackers that cheat, as a plugin in one file, and a defense that one of them does break."""

from __future__ import annotations

import gc
import json
import os
import stat
from pathlib import Path

import torch
from attrs import define

from vflair_core import Defense, Guess, Mechanism, hookimpl
from vflair_core.randomness import stream_seed

TRIED = 64  # seeds


@hookimpl
def vflair_attacks():
    return {
        "whole-vocabulary": whole_vocabulary,
        "constant": constant,
        "look-around": look_around,
        "guess-the-seed": guess_the_seed,
        "spy": Spy,
        "vandal": vandal,
        "asks-and-ignores": asks_and_ignores,
    }


@hookimpl
def vflair_defenses():
    return {"fixed-noise": FixedNoise, "on-victims": OnVictims}


def whole_vocabulary(mask, embeddings) -> Guess:
    """Name every token there is in one long row: no token is missed, whatever was sent."""
    everything = torch.arange(len(embeddings))
    return Guess(tokens=everything.expand(len(mask), -1))


@define
class Spy:
    """Say in the budget what of its surroundings can be read and written."""

    path: str = ""
    process: int = 0  # where to look; 0 for everyone from whom this process comes

    def __call__(self, mask) -> Guess:
        tries = {
            "memory": lambda process: (process / "mem").open("rb").close(),
            "folder": lambda process: (process / "cwd").readlink(),
            "files": lambda process: [file.readlink() for file in (process / "fd").iterdir()],
            "variables": lambda process: (process / "environ").read_bytes(),
            "path": lambda _: Path(self.path).read_bytes(),
            "written": lambda _: Path(self.path).with_suffix(".spy").write_text("here"),
            "handles": lambda _: [f for f in Path("/proc/self/fd").iterdir() if _leads_out(f)],
        }
        found = {
            name: float(any(_works(attempt, process) for process in self.looked_at()))
            for name, attempt in tries.items()
        }
        # It was told no seed from which the experiment's follows.
        job = json.loads(Path("job.json").read_text())
        seeds = {
            stream_seed(seed, f"attack {a['name']}")
            for seed in range(TRIED)
            for a in job["attacks"]
        }
        found["seed"] = float(any(a["seed"] in seeds for a in job["attacks"]))
        found["links"] = float(max(p.stat().st_nlink for p in Path().iterdir() if p.is_file()) - 1)
        return Guess(tokens=torch.where(mask, 7, -1), budget=found)

    def looked_at(self):
        """Who started this process, and who started that: the experiment is among them."""
        if self.process:
            yield Path("/proc", str(self.process))
            return
        number = os.getppid()
        while number > 1:
            yield Path("/proc", str(number))
            stat = Path("/proc", str(number), "stat").read_text()
            number = int(stat.rpartition(")")[2].split()[1])


def _leads_out(handle) -> bool:
    """Whether it leads to another process, beside the three that every process has."""
    if int(handle.name) < 3 or not handle.exists():
        return False
    mode = handle.stat().st_mode
    return stat.S_ISSOCK(mode) or stat.S_ISFIFO(mode)


def _works(attempt, process) -> bool:
    try:
        return attempt(process) not in (b"", [])  # nothing, where it is not told
    except OSError:
        return False


def vandal(mask) -> Guess:
    """Write into every file that it was given, in place."""
    for path in Path().glob("*.safetensors"):
        with path.open("r+b") as file:
            file.seek(-64, os.SEEK_END)
            file.write(b"\0" * 64)
    return Guess(tokens=torch.where(mask, 7, -1))


def asks_and_ignores(smashed, mask, embeddings, mechanism=None) -> Guess:
    """Ask what the defense does, and guess as if there were none."""
    if mechanism is not None:
        mechanism.expected(smashed)
    nearest = torch.nn.functional.normalize(smashed, dim=-1) @ embeddings.T
    return Guess(tokens=torch.where(mask, nearest.argmax(-1), -1))


def constant(mask) -> Guess:
    """Say one token everywhere."""
    return Guess(tokens=torch.where(mask, 7, -1))


def look_around(mask) -> Guess:
    """Take the truth from the memory of this process, or any text of the task from its modules."""
    from vflair_core.experiments.grading.truth import Truth
    from vflair_core.tasks.task import Task

    found, lengths = gc.get_objects(), mask.sum(1).tolist()
    for thing in found:
        if type(thing) is Truth and [len(row) for row in thing.tokens] == lengths:
            rows = [
                torch.nn.functional.pad(row, (0, mask.shape[1] - len(row)), value=-1)
                for row in thing.tokens
            ]
            return Guess(tokens=torch.stack(rows))
    assert not any(type(thing) is Task for thing in found)
    return Guess(tokens=torch.where(mask, 0, -1))


def guess_the_seed(smashed, mask, embeddings, mechanism=None) -> Guess:
    """Draw the noise again from every small seed, in torch's way and in the core's, and keep what fits best."""
    from vflair_core.randomness import generator_from

    sigma = mechanism.parts[-1].sigma if mechanism is not None else 0.0
    tokens = torch.full(mask.shape, -1)
    for n, row in enumerate(smashed):
        row = row[mask[n]]
        streams = [torch.Generator().manual_seed(seed) for seed in range(TRIED)]
        streams += [generator_from(seed, 0) for seed in range(TRIED)]
        best = float("inf")
        for stream in streams:
            clean = row - sigma * torch.randn(row.shape, generator=stream)
            distance, nearest = torch.cdist(clean, embeddings).min(1)
            if float(distance.mean()) < best:
                best, tokens[n, : len(row)] = float(distance.mean()), nearest
    return Guess(tokens=tokens)


class OnVictims(Defense):
    """Acts on batches of one: a victim that crosses alone is hidden, and training is as it was."""

    covers = frozenset({"prompt"})

    def on_smashed(self, smashed, exchange):
        return smashed * 0 if len(smashed) == 1 else smashed


class Known(Mechanism):
    """What is told of `FixedNoise`."""

    def __init__(self, sigma):
        self.sigma = sigma


@define(slots=False)
class FixedNoise(Defense):
    """Noise from a seed that anyone can guess: the same on every exchange."""

    seed: int = 5
    sigma: float = 1.0
    covers = frozenset({"prompt"})

    def on_smashed(self, smashed, exchange):
        stream = torch.Generator().manual_seed(self.seed)
        return smashed + self.sigma * torch.randn(smashed.shape, generator=stream)

    def mechanism(self):
        return Known(self.sigma)
