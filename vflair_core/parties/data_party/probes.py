"""Runs of the local part that send nothing: a probe answers where the model party would."""

from __future__ import annotations

from typing import Any

import torch
from attrs import define, field
from torch import Tensor

from vflair_core.communication.program import Program


@define(eq=False)
class ProbeStopped(BaseException):
    """Stops a probe where the exchange would have happened, with what would have crossed."""

    program: Program
    tensors: list[Tensor]

    def first_argument(self) -> Tensor:
        """The tensor that the first call of the program is about: the hidden states."""
        _, _, args, kwargs = self.program.steps[0]
        trees = [*args, *(tree for _, tree in kwargs)]
        return self.tensors[next(tree[1] for tree in trees if tree[0] == "leaf")]


@define(eq=False)
class Probe:
    """A run of the local part that sends nothing: exchanges before the one of interest get made-up answers.

    `wanted` is the id of the program of interest; None stands for the first.
    """

    wanted: str | None = None
    generator: torch.Generator = field(factory=torch.Generator)
    met: list[Program] = field(factory=list)

    def answer(self, program: Program, tensors: list[Tensor], shapes: list[Tensor]) -> list[Tensor]:
        """Stop here, or go on with random values of the right shape."""
        self.met.append(program)
        if self.wanted is None or program.id == self.wanted:
            raise ProbeStopped(program, tensors)
        device = tensors[0].device
        return [_made_up(shape, device, self.generator) for shape in shapes]


class FixedAnswer(Probe):
    """Answers with what it was given."""

    def __init__(self, returned: Tensor) -> None:
        super().__init__()
        self.returned = returned

    def answer(self, *_: Any) -> list[Tensor]:
        return [self.returned]


def _made_up(shape: Tensor, device: torch.device, generator: torch.Generator) -> Tensor:
    if not shape.is_floating_point():
        return torch.zeros_like(shape, device=device)
    values = torch.randn(shape.shape, generator=generator)
    # Not a leaf: the model may change what it got in place.
    return values.to(device, shape.dtype).requires_grad_().clone()
