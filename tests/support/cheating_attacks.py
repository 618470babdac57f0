"""Four attackers that cheat, as a plugin in one file, and a defense that one of them does break."""

from __future__ import annotations

import gc

import torch
from attrs import define

from vflair_core import Defense, Guess, hookimpl

TRIED = 64  # seeds


@hookimpl
def vflair_attacks():
    return {
        "whole-vocabulary": whole_vocabulary,
        "constant": constant,
        "look-around": look_around,
        "guess-the-seed": guess_the_seed,
    }


@hookimpl
def vflair_defenses():
    return {"fixed-noise": FixedNoise}


def whole_vocabulary(mask, embeddings) -> Guess:
    """Name every token there is in one long row: no token is missed, whatever was sent."""
    everything = torch.arange(len(embeddings))
    return Guess(tokens=everything.expand(len(mask), -1))


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


class Known:
    """What is told of `FixedNoise`."""

    in_nats = False

    def __init__(self, sigma):
        self.sigma = sigma

    def expected(self, hidden):
        return hidden


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
