"""What defenses do to rows alike: norms of public text, clipping, and a view of one example at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vflair_core import DefenseError, Exchange, Transcript

if TYPE_CHECKING:
    from vflair_core import Party


def public_ids(
    who: str, texts: Sequence[str], party: Party, *, length: int = 64, instead: str = ""
) -> list[Tensor]:
    """Return the token ids (1, T) of at most 128 public texts.

    Args:
        who: The defense that needs them, for the error.
        texts: The public text.
        party: Has the tokenizer.
        length: Most tokens of a text.
        instead: What else can be done, for the error.

    Raises:
        DefenseError: There is no public text or no tokenizer.
    """
    if not texts or party.tokenizer is None:
        raise DefenseError(
            f"{who} is calibrated on public text, and there is none (or no tokenizer). Give the task "
            f"public text{instead}."
        )
    encode = party.tokenizer
    return [
        encode(text, truncation=True, max_length=length, return_tensors="pt")["input_ids"]
        for text in texts[:128]
    ]


def public_rows(who: str, texts: Sequence[str], party: Party) -> Iterable[Tensor]:
    """Yield the undefended smashed data (1, T, D) of public texts, without dropout; nothing crosses."""
    for ids in public_ids(who, texts, party, instead=", or set clip to a number"):
        with torch.no_grad(), without_dropout(party):
            rows = party.smashed(input_ids=ids, use_cache=False)
        yield rows


def gradients_of(hidden: Tensor) -> torch.autograd.grad_mode.set_grad_enabled:
    """While this lasts, what is computed can be differentiated if `hidden` is, whatever else takes part.

    An attacker who climbs along a learned map needs its gradient, and one who only tries should keep no graph.
    """
    return torch.set_grad_enabled(torch.is_grad_enabled() and hidden.requires_grad)


@contextmanager
def without_dropout(party: Party) -> Iterator[None]:
    """While this lasts, the model is in eval mode."""
    training = party.model.training
    party.model.eval()
    try:
        yield
    finally:
        party.model.train(training)


def public_returned(
    who: str, texts: Sequence[str], party: Party
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the ids (1, T) of public texts and what the model party returns for them (1, T, D), without dropout.

    Each crosses once, through the defenses but those of text: there is nothing to hide. No gradient does.
    """
    for ids in public_ids(who, texts, party):
        with (
            torch.no_grad(),
            without_dropout(party),
            party.answering(),
            party.public_text(),
            party.channel.tap(Transcript()) as crossed,
        ):
            party.model(input_ids=ids, use_cache=False)
        (returned,) = [r.tensor for r in crossed.messages if r.role == "returned"]
        yield ids, returned.to(party.model.device)


def classes_of(party: Party) -> int:
    """C, the number of classes that the model's config says; 2 where it says none."""
    return int(party.model.config.num_labels or 2)


def width_of(party: Party) -> int:
    """D, the width of the hidden states."""
    return int(party.model.config.get_text_config().hidden_size)


def clip_rows(rows: Tensor, bound: float, order: float = 2) -> Tensor:
    """Scale each row down to norm `bound` where it is longer; in float32, as half precision overshoots."""
    exact = rows.float()
    norms = exact.norm(p=order, dim=-1, keepdim=True)
    return exact * (bound / norms.clamp_min(1e-12)).clamp(max=1.0)


def clip_examples(tensor: Tensor, bound: float, exchange: Exchange, order: float = 2) -> Tensor:
    """Scale all that a tensor holds of one example down to norm `bound` together."""
    rows = examples_first(tensor, exchange)
    clipped = clip_rows(rows.flatten(1), bound, order).view(rows.shape)
    return clipped.transpose(0, 1) if exchange.axes == "TBD" else clipped


def clip_guesses(gradients: Tensor, bound: float, order: float = 2) -> Tensor:
    """Scale the gradient that each guess about an example would give, (..., T, D), down to norm `bound`."""
    return clip_rows(gradients.flatten(-2), bound, order).view(gradients.shape)


def examples_first(tensor: Tensor, exchange: Exchange) -> Tensor:
    """Return the tensor with the batch as its first dimension.

    Raises:
        DefenseError: Nobody knows which dimension is the batch.
    """
    if exchange.axes == "TBD":
        return tensor.transpose(0, 1)
    if exchange.axes.startswith("B"):
        return tensor
    raise DefenseError(
        f"A tensor of shape {tuple(tensor.shape)} ({exchange.name!r}) cannot be parted into examples. Use "
        "another cut, or a defense that needs no examples."
    )


def noise_like(tensor: Tensor, exchange: Exchange) -> Tensor:
    """Draw N(0, 1) for each coordinate, fresh, from the defense's own stream."""
    drawn = torch.randn(tensor.shape, generator=exchange.generator)
    return drawn.to(tensor.device)


def drawing(generator: torch.Generator) -> Exchange:
    """An exchange of an attacker's own, who draws what could have been sent."""
    return Exchange(0, 0, "eval", generator=generator)


def laplace_like(tensor: Tensor, exchange: Exchange) -> Tensor:
    """Draw Laplace(0, 1) for each coordinate: a random sign times an exponential."""
    size = torch.empty(tensor.shape).exponential_(generator=exchange.generator)
    signs = torch.randint(0, 2, tensor.shape, generator=exchange.generator) * 2 - 1
    return (size * signs).to(tensor.device)


def real_rows(tensor: Tensor, exchange: Exchange) -> Tensor:
    """Return the rows (N, D) that are no padding."""
    rows = examples_first(tensor, exchange)
    if exchange.mask is None or rows.dim() < 3:
        return rows.reshape(-1, rows.shape[-1])
    return rows[exchange.mask.bool().to(rows.device)]


def is_off(bound: float, noise: float) -> bool:
    """Whether nothing is clipped and nothing added.

    Raises:
        DefenseError: Noise is to be a multiple of a clip that does not exist.
    """
    if math.isinf(bound) and noise:
        raise DefenseError("Noise is set as a multiple of the clip, so clip = inf needs noise 0.")
    return math.isinf(bound)
